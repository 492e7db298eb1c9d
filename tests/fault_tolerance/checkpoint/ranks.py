"""Ranks as threads, each with what it returned or raised."""

from collections.abc import Callable
from typing import Any

from bagualu.comm import simulated
from bagualu.comm.group import Communicator, Group


def run(size: int, function: Callable[[Group], Any]) -> list[Any]:
    """What function(group) returned on each rank, or the exception it raised. Threads are named rank-0, rank-1, ..."""

    def attempt(communicator: Communicator) -> Any:
        try:
            return function(communicator.world)
        except Exception as error:
            return error

    return simulated.run(size, attempt, timeout_seconds=60)
