"""How a run ends: its exit code and its last words. Free of torch."""

import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bagualu.comm.errors import CommunicationError, RecipeError, StorageError
from bagualu.fault_tolerance.injection.fault import ProcessKilled

DONE = 0
FAILED = 1
REFUSED = 2
"""Wrong usage or recipe."""
STOPPED = 75
"""Stopped on request, with a checkpoint saved or before anything was done: nothing is lost, and the same command with
checkpoint.resume=true goes on, or begins."""
LOOPED = 76
"""A crash loop: the same step failed again and again; starting the same command again will not help."""


INTERRUPTED = 130
"""What a shell makes of a command that Ctrl-C has ended before anything was begun."""


class FinalError(RuntimeError):
    """A failure that would only happen again: workers are not started anew after it."""


class GuardError(FinalError):
    """A step could not be done rightly (`guard.*`) and the run ends; nothing of it was applied on any rank."""


@dataclass
class Failure:
    """Why one rank could not go on. `time` orders failures: seconds since the epoch."""

    rank: int
    phase: str
    cause: str
    time: float
    kind: str = "error"
    """error: this rank's own; peer: it lost another one; recipe: refused, with the fix; killed: by a signal;
    storage: it cannot be written or read now, and may be again;
    final: its own, and it would only happen again; loop: the launcher's verdict on one that did happen again;
    hung: it stood still while others waited, as they or a watcher have seen (rank -1: nobody alone, or it cannot be told);
    stopped: none at all, it was asked to stop before there was anything to save."""
    step: int = 0
    """The step under way; 0 before the first."""
    missing: dict[str, Any] | None = None
    """Of a peer that was lost, where the rank could tell: its "rank", "step" and "phase", and "why"."""

    @property
    def who(self) -> str:
        return f"rank {self.rank}" if self.rank >= 0 else "no single rank"

    @property
    def exit_code(self) -> int:
        """What a run ends with that could not go on after this."""
        return {"recipe": REFUSED, "loop": LOOPED, "stopped": STOPPED}.get(self.kind, FAILED)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_KINDS = {"recipe": RecipeError, "peer": CommunicationError, "final": FinalError, "storage": StorageError, "killed": ProcessKilled}


def failure(rank: int, phase: str, error: BaseException, time: float, step: int = 0) -> Failure:
    """What `error`, caught in `phase`, says in one line; the phase is told with the place in Bagualu's own code."""
    kind = next((kind for kind, known in _KINDS.items() if isinstance(error, known)), "error")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    cause = text if kind == "recipe" else f"{type(error).__name__}: {text}".rstrip(": ")
    root = Path(__file__).resolve().parents[2]
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(root)]
    place = f" ({Path(own[-1].filename).relative_to(root)}:{own[-1].lineno} in {own[-1].name})" if own else ""
    return Failure(rank, phase + place, cause, time, kind, step)


def first(failures: list[Failure]) -> Failure:
    """The one that began it: a refusal, else a kill, else the earliest of a rank's own errors, else the earliest lost peer.

    A killed process cannot write when it died, and its peers notice at once, so a kill goes before errors. Of ranks that lost a
    peer those go first that can tell which.
    """
    order = {"recipe": 0, "killed": 1, "peer": 3}
    return min(failures, key=lambda one: (order.get(one.kind, 2), one.missing is None, one.time, one.rank))


def at_fault(failure: Failure, unwatched: bool) -> Failure:
    """`failure` as it is to be told: a rank that lost a peer has noticed that, and is not the one to name.

    `unwatched`: nobody looks for ranks that stand still (restart.hang_seconds=0).
    """
    if failure.kind != "peer" or failure.rank < 0:
        return failure
    noticed = f"noticed by rank {failure.rank}: {failure.cause}"
    if failure.missing is None:
        who = "who is missing is unknown" + (": set restart.hang_seconds" if unwatched else "")
        return replace(failure, rank=-1, cause=f"{noticed}; {who}")
    found = failure.missing
    return Failure(found["rank"], found["phase"], f"{found['why']}; {noticed}", failure.time, "hung", found["step"])


def os_error(error: OSError) -> str:
    """What the operating system refused and of which file, with what to look at."""
    file = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{file}; see whether there is room and whether it can be written"


_WHAT_NEXT = {
    "final": "with nothing changed it would only happen again",  # the cause says what to change
    "loop": "put that right, then go on with checkpoint.resume=true",
}


def what_next(failure: Failure) -> str:
    """What to do after a failure where there is a checkpoint to go on from."""
    return _WHAT_NEXT.get(failure.kind, "go on with checkpoint.resume=true")


def last_words(failure: Failure, advice: str) -> str:
    """The line a failed run ends with."""
    if failure.kind == "recipe":
        return f"bagualu: error: {failure.cause}"
    if failure.kind == "stopped":
        return f"bagualu: stopped: {failure.cause}; {advice}"
    return f"bagualu: failed: {failure.who}, {failure.phase}: {failure.cause}; {advice}"
