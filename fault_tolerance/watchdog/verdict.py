"""Determines which rank is at fault when a run makes no progress: a pure function of the state of every rank.

A rank that waits in a communication is not at fault. It waits for those ranks of its line of operations whose count is lower. They
may wait for other ranks in turn, until the chain ends:

    at a rank that does not wait                it is stopped, or computes for longer than its phase may take: the culprit
    at an operation that other ranks have left  the rank does not return from it: the culprit
    at an operation that all ranks have joined  a stopped rank is the culprit; otherwise the link between them is lost
    in a circle                                 no single rank: the ranks call operations in different orders
    at a rank on another node                   it cannot be seen from here
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bagualu.comm.monitor import Line, Phase

STOPPED = ("stopped", "tracing-stop")
GONE = ("zombie", "dead", "gone")
LONG_POINTS = frozenset({"start", *(phase for phase in Phase if phase.activity != "train")})
"""Phases that may take long without visible progress."""
SPARE = "spare"
"""The phase (`Seen.point`) of a rank that has no work; such ranks are not judged."""
_SILENT = "it computes, or is stuck in native code, and makes no progress"


@dataclass(frozen=True)
class Patience:
    """The seconds that a rank may go without any change in its heartbeat before the run is taken to hang."""

    hang_seconds: float
    long_seconds: float
    """The limit, instead of `hang_seconds`, in a phase that may take long, and until the process has finished its first step
    (compilation)."""
    wait_seconds: float = math.inf
    """Waiting time (`Seen.waited_seconds`) after which a rank will soon give up. Once a rank has waited for so long, the limit for
    the ranks it waits for is `hang_seconds` in every phase."""


@dataclass(frozen=True)
class Seen:
    """The state of a rank, as another process sees it."""

    rank: int
    step: int = 0
    steps_begun: int = 0
    point: str = "start"
    operation: str = ""
    """Name of the operation that the rank waits for; empty if the rank does not wait."""
    line: Line | None = None
    number: int = 0
    counts: Mapping[Line, int] = field(default_factory=dict)
    silent_seconds: float = 0.0
    """Seconds since the last change in the rank's heartbeat."""
    waited_seconds: float = 0.0
    """Seconds since a rank that waits began to wait, by the clock by which it gives up. `silent_seconds` may be less: time in which
    nobody could look at the rank is not in it."""
    cpu_seconds: float = 0.0
    """Seconds of processor time that all threads of the rank's process have used during `silent_seconds`."""
    process: str = "running"
    """State of the rank's process, as psutil names it; "gone" if the process does not exist."""

    @property
    def waits(self) -> bool:
        return self.line is not None

    @property
    def stopped(self) -> bool:
        return self.process in STOPPED

    def overdue(self, patience: Patience) -> bool:
        """Returns whether the rank has gone without a change for longer than it may in its present phase."""
        takes_long = not self.waits and not self.stopped and (self.point in LONG_POINTS or self.steps_begun <= 1)
        return self.silent_seconds >= (patience.long_seconds if takes_long else patience.hang_seconds)

    def doing(self) -> str:
        """Returns a description of the state for messages."""
        where = f"at {self.point} of step {self.step}" if self.step else f"at {self.point}"
        if self.line is not None:
            where = f"waits for {self.operation} number {self.number} in {self.line}, {where}"
        cpu = f"{self.cpu_seconds:.1f} s of processor time since" if self.process not in GONE else "its process has ended"
        return f"{where}, {self.silent_seconds:.0f} s without a change ({cpu}, process {self.process})"


@dataclass(frozen=True)
class HangDiagnosis:
    """The ranks at fault when the run makes no progress, and the reason. `culprits` is empty if they cannot be determined."""

    culprits: tuple[int, ...]
    why: str


def judge(seen: Mapping[int, Seen], patience: Patience) -> HangDiagnosis | None:
    """Returns the diagnosis that follows from `seen`, the state of each rank; None while a rank may still make progress."""
    seen = {rank: state for rank, state in seen.items() if state.point != SPARE}
    if stopped := _stopped(seen, patience):
        return stopped
    alive = [state for state in seen.values() if state.process not in GONE]
    silent = [state for state in alive if not state.waits and state.overdue(patience)]
    if len(silent) > 1:  # the host of an accelerator does not see what its device waits for
        silent = [state for state in silent if _is_late(state, alive)] or silent
    if silent and len(silent) == len(alive) > 1:
        return _nobody(silent, "every rank computes and none makes progress")
    if silent:
        return _culprits(silent, _SILENT)
    return _first_end(alive, seen, patience)


def missed_by(rank: int, seen: Mapping[int, Seen], patience: Patience) -> HangDiagnosis | None:
    """Returns the diagnosis of which ranks kept `rank` waiting until it gave up, just now; None if `seen` does not show that.

    Only ranks without a change for as long as `patience` allows can be culprits. Others may themselves have waited until a moment
    ago.
    """
    state = seen.get(rank)
    if state is None or not state.waits or not state.overdue(patience):
        return None
    verdict = _stopped(seen, patience) or _follow(state, seen, patience)
    return verdict if verdict and verdict.culprits and rank not in verdict.culprits else None


def _stopped(seen: Mapping[int, Seen], patience: Patience) -> HangDiagnosis | None:
    stopped = [state for state in seen.values() if state.stopped and state.overdue(patience)]
    return _culprits(stopped, "its process is stopped (SIGSTOP, or a debugger)") if stopped else None


def _first_end(waiting: list[Seen], seen: Mapping[int, Seen], patience: Patience) -> HangDiagnosis | None:
    """Returns the first diagnosis that results from a rank that has waited too long; None if there is none."""
    ends = (_follow(state, seen, patience) for state in waiting if state.waits and state.overdue(patience))
    return next((end for end in ends if end), None)


def _is_late(state: Seen, others: list[Seen]) -> bool:
    """Returns whether another rank has joined a collective of `state`'s rank that this rank has not joined yet."""
    return any(
        count > state.counts.get(line, 0)
        for other in others
        for line, count in other.counts.items()
        if state.rank in line.ranks and not line.messages
    )


def _follow(state: Seen, seen: Mapping[int, Seen], patience: Patience) -> HangDiagnosis | None:
    """Follows the chain of waits from a rank that has waited too long and returns the diagnosis at its end; None if a rank in it
    may still make progress."""
    if max(state.waited_seconds, state.silent_seconds) >= patience.wait_seconds:
        patience = replace(patience, long_seconds=patience.hang_seconds)
    path = [state]
    while True:
        behind = _behind(state, seen)
        known = [seen[rank] for rank in behind if rank in seen]
        if not behind:
            return _all_have_joined(state, seen, patience)
        if not known:
            if path[0].silent_seconds < 2 * patience.hang_seconds:
                return None  # the watchdog of the node of those ranks sees more and decides first
            what = f"rank {state.rank} {state.doing()}; ranks {_list(behind)}, on another node, have not joined it"
            return HangDiagnosis((), what)
        if gone := [other for other in known if other.process in GONE]:
            return _culprits(gone, "it has ended while others wait for it")
        if any(not other.overdue(patience) for other in known):
            return None
        if computing := [other for other in known if not other.waits]:
            return _culprits(computing, _SILENT)
        state = known[0]
        if state in path:
            return _nobody(path[path.index(state) :], "they wait for each other, because they call operations in different orders")
        path.append(state)


def _behind(state: Seen, seen: Mapping[int, Seen]) -> list[int]:
    """Returns the ranks of the line of `state` that have not joined its operation. If no rank of this node is behind, returns those
    of other nodes, since their counts are unknown."""
    assert state.line is not None
    others = [rank for rank in state.line.ranks if rank != state.rank]
    behind = [rank for rank in others if rank in seen and seen[rank].counts.get(state.line, 0) < state.number]
    return behind or [rank for rank in others if rank not in seen]


def _all_have_joined(state: Seen, seen: Mapping[int, Seen], patience: Patience) -> HangDiagnosis | None:
    """Returns the diagnosis for a rank that waits for an operation that all ranks have joined; None if a rank may still make
    progress."""
    assert state.line is not None
    members = [seen[rank] for rank in state.line.ranks]
    if any(not member.overdue(patience) for member in members):
        return None
    waiting = [member for member in members if (member.line, member.number) == (state.line, state.number)]
    what = f"{state.operation} number {state.number} in {state.line}"
    if len(waiting) < len(members):
        return _culprits(waiting, f"{what} has ended on other ranks, but this rank does not return from it: a native deadlock, "
                                  "a thread that keeps Python's lock, or a lost link")  # fmt: skip
    return _nobody(members, f"all have joined {what} and it does not end: the link between them is lost")


def _culprits(ranks: list[Seen], why: str) -> HangDiagnosis:
    each = "; ".join(f"rank {state.rank} {state.doing()}" for state in ranks)
    return HangDiagnosis(tuple(state.rank for state in ranks), f"{each}: {why}")


def _nobody(ranks: list[Seen], why: str) -> HangDiagnosis:
    return HangDiagnosis((), f"ranks {_list([state.rank for state in ranks])}: {why}")


def _list(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
