"""A small run, what it came to, and whether two came to the same. Not collected by pytest."""

import json
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.directory import latest
from bagualu.fault_tolerance.checkpoint.load import Checkpoint
from bagualu.trainer.config import Recipe
from bagualu.trainer.recipe import compose
from bagualu.trainer.run import train

SMALL = [
    "recipe=tiny", "model=tiny_dense", "model.layers=2", "model.hidden=16", "model.heads=4", "model.kv_heads=4", "model.ffn=24",
    "model.vocab=64", "data.source=random", "data.sequence_length=8", "data.global_batch=8", "train.micro_batch=1",
    "train.dtype=float64", "train.validate_every=0", "train.validation_sequences=4", "parallel.pipeline=1", "parallel.expert=1",
    "launch.threads=1", "launch.affinity=false", "log.every=1000",
]  # fmt: skip


def small(folder: Path, *words: str) -> Recipe:
    """The recipe of a small run in `folder`."""
    return compose([*SMALL, *words, f"run.dir={folder}"])


def undisturbed(communicator: Communicator, recipe: Recipe) -> dict[str, Any]:
    """A run with nothing happening to it."""
    return train(recipe, communicator)


def figures(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every line of metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of the newest checkpoint, whole."""
    newest = latest(folder / "checkpoints")
    assert newest is not None
    checkpoint, whole = Checkpoint(newest), {}
    for name, (shape, dtype) in checkpoint.tensors.items():
        whole[name] = torch.empty(shape, dtype=dtype)
        checkpoint.read(name, (0,) * len(shape), whole[name])
    return whole
