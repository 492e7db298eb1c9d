"""Ranks that are threads, with a described cluster."""

import json
from pathlib import Path

from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.launch.workers.threads import run_threads
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe.compose import compose

WORDS = ["recipe=tiny_dense", "comm.backend=simulated", "parallel.pipeline=2", "data.source=random", "data.sequence_length=32",
         "model.layers=4", "train.steps=3", "train.validate_every=2", "checkpoint.every=0", "log.progress=lines"]  # fmt: skip


def virtual_seconds(folder: Path, *words: str) -> list[float]:
    """What each step of a run takes on the cluster."""
    folder.mkdir()
    recipe = compose([*WORDS, f"run.dir={folder}/run", *words])
    ended = run_threads(recipe, 2, "bagualu.trainer.run:train", False, folder, StopRequest())
    assert ended.failure is None
    lines = RunDirectory(f"{folder}/run").metrics.read_text().splitlines()
    return [json.loads(line)["virtual_step_seconds"] for line in lines]


def test_metrics_say_what_a_step_would_take_on_the_cluster(tmp_path: Path) -> None:
    """The same in every step but the first, which computes angles, whatever this machine does meanwhile; longer on slower chips."""
    (_, *fast), (_, *slow) = (virtual_seconds(tmp_path / name, f"cluster={name}") for name in ("h100", "sw26010pro"))
    assert 0 < fast[0] == fast[1] < slow[0] == slow[1]
