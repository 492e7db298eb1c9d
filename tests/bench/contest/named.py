"""The trainer, as workers of a benchmark call it: each says which process it is."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bagualu.comm.group import Communicator
from bagualu.trainer import run
from bagualu.trainer.recipe.config import Recipe


def train(recipe: Recipe, communicator: Communicator, stop: Callable[[], bool], scratch: Path | None = None) -> dict[str, Any]:
    """As `bagualu.trainer.run.train`."""
    (Path(recipe.run.dir) / process_file(communicator.rank)).write_text(str(os.getpid()), encoding="utf-8")
    return run.train(recipe, communicator, stop, scratch)


def process_file(rank: int) -> str:
    """The file of the run directory with the process id of `rank`."""
    return f"rank-{rank}.pid"
