"""A small run of the trainer, as started by the launcher and as resumed without it. Not collected by pytest."""

from pathlib import Path

from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from tests import harness
from tests.standing import go_on

SMALL = [
    "recipe=tiny", "model=tiny_dense", "model.layers=2", "model.hidden=16", "model.heads=4", "model.kv_heads=4", "model.ffn=24",
    "model.vocab=64", "data.source=random", "data.sequence_length=8", "data.global_batch=8", "train.micro_batch=1",
    "train.dtype=float64", "train.validate_every=4", "train.validation_sequences=4", "parallel.pipeline=1", "parallel.expert=1",
    "launch.threads=1", "launch.affinity=false", "log.every=1000",
]  # fmt: skip
FOUR = ["parallel.data=2", "parallel.tensor=2", "data.global_batch=4", "train.steps=9", "checkpoint.every=2"]
"""Four ranks with two micro-batches each; a run that is stopped by a fault has lost at most two saves, the newest one still on its
way to the disk."""
MOST_LOST = 4


def small(folder: Path, *words: str) -> Recipe:
    """The recipe of a small run in `folder`."""
    return compose([*SMALL, *words, f"run.dir={folder}"])


def finish(folder: Path, *words: str, backend: str = "gloo") -> None:
    """Resume a small run that has ended early, and train it to its end."""
    recipe = small(folder, *words, "checkpoint.resume=true")
    harness.run(backend, recipe.world_size(), go_on, recipe)
