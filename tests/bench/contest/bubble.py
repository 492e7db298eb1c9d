"""Schedules on two processes, each over stages that are alike."""

from pathlib import Path
from typing import Any

from bagualu.trainer.recipe.compose import compose
from contest.bubbles import Passes, row
from contest.forecasts import schedule_of
from contest.runs import train

WORDS = ["recipe=bench_dense", "model.layers=8", "model.vocab=256", "data.sequence_length=128", "data.global_batch=8",
         "launch.workers=2", "launch.threads=1", "parallel.pipeline=2", "train.micro_batch=1", "parallel.balance=uniform",
         "train.steps=3"]  # fmt: skip
"""A vocabulary so small that embedding and head weigh nothing, and stages of as many layers each. The third step is recorded."""


def compare(schedules: list[str], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each schedule; they take turns."""
    steps: dict[str, list[Passes]] = {name: [] for name in schedules}
    for turn in range(rounds):
        for name, recorded in steps.items():
            run = train([*WORDS, f"parallel.schedule={name}"], folder / f"{name}-{turn}", folder / f"{name}-{turn}.log")
            recorded.append(run.passes)
    return [row(name, schedule_of(compose([*WORDS, f"parallel.schedule={name}"])), recorded) for name, recorded in steps.items()]
