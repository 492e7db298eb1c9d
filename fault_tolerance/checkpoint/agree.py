"""Agreement between ranks (bagualu.comm.agree) that raises the errors of checkpoints."""

from collections.abc import Callable
from typing import TypeVar

from bagualu.comm import agree
from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, CheckpointStorageError

T = TypeVar("T")


def on_all(function: Callable[[], T], group: Group) -> T:
    """Calls `function` and returns this rank's result if the function raised on no rank, like `bagualu.comm.agree.on_all`.
    Collective.

    Otherwise every rank raises the same error: RecipeError if any rank raised one, CheckpointStorageError if every failure was of
    that class, else CheckpointError. A CommunicationError is raised at once, on its own rank alone.
    """
    return agree.on_all(function, group, CheckpointError, CheckpointStorageError)
