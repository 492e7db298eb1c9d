"""Describes how a run ends: exit codes, failures and the last line that it prints."""

import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bagualu.comm.errors import CommunicationError, RecipeError, StorageError
from bagualu.fault_tolerance.injection.fault import ProcessKilled

DONE = 0
FAILED = 1
REFUSED = 2
"""Exit code: the command line or the recipe is wrong."""
STOPPED = 75
"""Exit code: the run stopped on request, with a checkpoint saved or before it did anything: nothing is lost, and the same command
with checkpoint.resume=true continues or begins it."""
LOOPED = 76
"""Exit code: the run was in a crash loop: the same step failed repeatedly, so starting the same command again will not help."""


INTERRUPTED = 130
"""The exit code that a shell reports for a command ended by Ctrl-C; here, if it comes before the run handles signals."""


class FinalError(RuntimeError):
    """A failure that would recur after a restart, so workers are not restarted."""


class GuardError(FinalError):
    """The guard (`guard.*`) ends the run because of a faulty step. No rank keeps that step's update: it is not saved."""


@dataclass
class Failure:
    """Why a rank could not continue, or why a run ended if no single rank is to blame (`rank` -1). `time`, in seconds since the
    epoch, orders failures."""

    rank: int
    phase: str
    cause: str
    time: float
    kind: str = "error"
    """error: an error of this rank; peer: it lost contact with another rank; recipe: the recipe was refused, `cause` has the fix;
    killed: the rank's process ended by a signal, or without writing why; storage: files cannot be written or read now, but perhaps
    later; final: an error of this rank that would recur after a restart; loop: the launcher found that a failure did recur;
    hung: it made no progress while others waited, as they or a watcher saw (rank -1: not a single rank, or unknown);
    stopped: no failure; the run was asked to stop before there was anything to save."""
    step: int = 0
    """The step in progress (from 1); 0 before the first."""
    missing: dict[str, Any] | None = None
    """The lost peer, if this rank could determine it: its "rank", "step" and "phase", and "why" it is to blame; None otherwise."""

    @property
    def who(self) -> str:
        return f"rank {self.rank}" if self.rank >= 0 else "no single rank"

    @property
    def exit_code(self) -> int:
        """The exit code of a run that this failure ends."""
        return {"recipe": REFUSED, "loop": LOOPED, "stopped": STOPPED}.get(self.kind, FAILED)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_KINDS = {"recipe": RecipeError, "peer": CommunicationError, "final": FinalError, "storage": StorageError, "killed": ProcessKilled}


def failure(rank: int, phase: str, error: BaseException, time: float, step: int = 0) -> Failure:
    """Returns `error`, caught in `phase`, as a Failure, whose cause is the first line of the error's message. To the phase it adds
    the innermost line of Bagualu's own code in the traceback."""
    kind = next((kind for kind, known in _KINDS.items() if isinstance(error, known)), "error")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    cause = text if kind == "recipe" else f"{type(error).__name__}: {text}".rstrip(": ")
    root = Path(__file__).resolve().parents[2]
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(root)]
    location = f" ({Path(own[-1].filename).relative_to(root)}:{own[-1].lineno} in {own[-1].name})" if own else ""
    return Failure(rank, phase + location, cause, time, kind, step)


def first(failures: list[Failure]) -> Failure:
    """Returns the failure that caused the others: a refused recipe, else a kill, else the earliest error of a rank's own, else the
    earliest loss of a peer.

    A killed process cannot record when it died, and its peers fail immediately afterwards, so a kill comes before errors. Among
    ranks that lost a peer, those that know which peer come first.
    """
    order = {"recipe": 0, "killed": 1, "peer": 3}
    return min(failures, key=lambda failure: (order.get(failure.kind, 2), failure.missing is None, failure.time, failure.rank))


def at_fault(failure: Failure, unwatched: bool) -> Failure:
    """Returns `failure` with the blame on the right rank: a rank that lost a peer only noticed the loss, so the result names the
    peer, or rank -1 if the peer is unknown. Failures of other kinds are returned unchanged.

    `unwatched`: no watcher looks for hung ranks (restart.hang_seconds=0).
    """
    if failure.kind != "peer" or failure.rank < 0:
        return failure
    noticed = f"noticed by rank {failure.rank}: {failure.cause}"
    if failure.missing is None:
        who = "who is missing is unknown" + (": set restart.hang_seconds" if unwatched else "")
        return replace(failure, rank=-1, cause=f"{noticed}; {who}")
    peer = failure.missing
    return Failure(peer["rank"], peer["phase"], f"{peer['why']}; {noticed}", failure.time, "hung", peer["step"])


def os_error(error: OSError) -> str:
    """Describes an OSError: what failed, for which file, and what to check."""
    file = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{file}; see whether there is room and whether it can be written"


_WHAT_NEXT = {
    "final": "with nothing changed it would only happen again",  # the cause says what to change
    "loop": "put that right, then go on with checkpoint.resume=true",
}


def what_next(failure: Failure) -> str:
    """Returns what the user should do after a failure, given a checkpoint to resume from."""
    return _WHAT_NEXT.get(failure.kind, "go on with checkpoint.resume=true")


def last_line(failure: Failure, advice: str) -> str:
    """Returns the last line that a failed run prints."""
    if failure.kind == "recipe":
        return f"bagualu: error: {failure.cause}"
    if failure.kind == "stopped":
        return f"bagualu: stopped: {failure.cause}; {advice}"
    return f"bagualu: failed: {failure.who}, {failure.phase}: {failure.cause}; {advice}"
