"""Agreement between ranks (bagualu.comm.agree) that raises the errors of checkpoints."""

from collections.abc import Callable
from typing import TypeVar

from bagualu.comm import agree
from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, CheckpointStorageError

T = TypeVar("T")


def on_all(function: Callable[[], T], group: Group) -> T:
    """Calls `function` and returns its result if it raised on no rank, like `bagualu.comm.agree.on_all`. Collective.

    Otherwise every rank raises the same error: RecipeError, CheckpointError, or CheckpointStorageError if only storage failed.
    """
    return agree.on_all(function, group, CheckpointError, CheckpointStorageError)
