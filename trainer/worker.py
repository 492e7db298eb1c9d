"""One rank's life: connect, train, leave. The same under `bagualu train`, torchrun and SLURM, and as a thread."""

import pkgutil
import time
from collections.abc import Callable
from typing import Any

import torch

from bagualu.comm.group import Communicator, connect
from bagualu.comm.world import World
from bagualu.trainer.config import Recipe
from bagualu.trainer.outcome import Failure, failure

TRAIN = "bagualu.trainer.run:train"
"""What a rank runs, as "module:function": (recipe, communicator, stop) -> summary."""


class RankFailed(Exception):
    """A rank could not go on; `failure` says why, the cause is the exception itself."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.cause)
        self.failure = failure


def work(recipe: Recipe, world: World, stop: Callable[[], bool], entrypoint: str = TRAIN) -> dict[str, Any]:
    """Join the world and train; the run's summary. Raises RankFailed."""
    try:
        communicator = connect(recipe.comm.backend, world, recipe.comm.timeout_seconds)
    except Exception as error:
        raise RankFailed(failure(world.rank, "connect", error, time.time())) from error
    summary = train(recipe, communicator, stop, entrypoint)
    communicator.close()
    return summary


def train(recipe: Recipe, communicator: Communicator, stop: Callable[[], bool], entrypoint: str = TRAIN) -> dict[str, Any]:
    """Train on a rank that is connected. Raises RankFailed; the connection is then left to the process's end, because
    closing it could wait for the very peers that are gone."""
    try:
        summary: dict[str, Any] = pkgutil.resolve_name(entrypoint)(recipe, communicator, stop)
        return summary
    except Exception as error:
        raise RankFailed(failure(communicator.rank, "train", error, time.time())) from error


def use_threads(count: int) -> None:
    """CPU threads of this process, whatever the environment said when torch was imported."""
    torch.set_num_threads(count)
