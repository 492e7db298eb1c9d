"""How a run ended on this machine."""

import time
from dataclasses import dataclass
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.trainer.process.failure import Failure, failure


@dataclass(frozen=True)
class Ended:
    """The end of a run on this machine: its summary, or the failure after which it was not restarted."""

    summary: dict[str, Any] | None = None
    failure: Failure | None = None
    prints_summary: bool = True
    """Whether this node prints the summary at the end; on several nodes, only the node with rank 0 does."""


def refused(error: RecipeError) -> Ended:
    """Returns the end of the run on a node that cannot take part because of `error`."""
    return Ended(failure=failure(-1, "start", error, time.time()))


def killed() -> Ended:
    cause = "killed by a second Ctrl-C, nothing saved since the last checkpoint"
    return Ended(failure=Failure(-1, "train", cause, time.time(), "killed"))


def not_begun() -> Ended:
    return Ended(failure=Failure(-1, "start", "asked to stop before anything was trained", time.time(), "stopped"))
