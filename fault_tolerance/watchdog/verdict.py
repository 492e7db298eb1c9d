"""Who is at fault when a run stands still: a pure function of what is seen of every rank.

Ranks that wait in a communication are victims. A rank waits for the members of its line of operations whose count is behind, they
perhaps for others, until the chain ends:

    at a rank that waits for nobody          it is stopped, or computes for longer than its phase may take: the culprit
    at a rank that nobody keeps waiting      its operation is over elsewhere, it does not come back from it: the culprit
    at an operation that all have joined     a member is stopped: the culprit; else the link between them is lost
    in a circle                              nobody alone: the ranks call in different orders
    at a rank on another node                it is not to be seen from here
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bagualu.comm.monitor import Line
from bagualu.fault_tolerance.points import POINTS

STOPPED = ("stopped", "tracing-stop")
GONE = ("zombie", "dead", "gone")
LONG_POINTS = frozenset({"start", *(point for point, phase in POINTS.items() if phase != "train")})
"""Points that may take long without anything to be seen."""
SPARE = "spare"
"""The point of a rank that has nothing to do."""
_SILENT = "it computes, or is stuck in native code, and does not come on"


@dataclass(frozen=True)
class Patience:
    """Seconds without any change that are not yet a hang."""

    hang_seconds: float
    long_seconds: float
    """The same at a point that may take long, and until the process has come through its first step (compilation)."""
    wait_seconds: float = math.inf
    """Who has waited so long will soon give up; whom it waits for is then given `hang_seconds` everywhere."""


@dataclass(frozen=True)
class Seen:
    """One rank, as it is seen from outside."""

    rank: int
    step: int = 0
    steps_begun: int = 0
    point: str = "start"
    operation: str = ""
    """What it waits for; empty: it waits for nobody."""
    line: Line | None = None
    number: int = 0
    counts: Mapping[Line, int] = field(default_factory=dict)
    silent_seconds: float = 0.0
    """Without a change."""
    cpu_seconds: float = 0.0
    """Processor time that its process used in them, all threads together."""
    process: str = "running"
    """State of its process, as psutil names it; gone: there is none."""

    @property
    def waits(self) -> bool:
        return self.line is not None

    @property
    def stopped(self) -> bool:
        return self.process in STOPPED

    def overdue(self, patience: Patience) -> bool:
        """Whether nothing has happened for longer than it may, where it is."""
        takes_long = not self.waits and not self.stopped and (self.point in LONG_POINTS or self.steps_begun <= 1)
        return self.silent_seconds >= (patience.long_seconds if takes_long else patience.hang_seconds)

    def doing(self) -> str:
        """One line for people."""
        where = f"at {self.point} of step {self.step}" if self.step else f"at {self.point}"
        if self.line is not None:
            where = f"waits for {self.operation} number {self.number} in {self.line}, {where}"
        cpu = f"{self.cpu_seconds:.1f} s of processor time since" if self.process not in GONE else "its process has ended"
        return f"{where}, {self.silent_seconds:.0f} s without a change ({cpu}, process {self.process})"


@dataclass(frozen=True)
class Verdict:
    """Why the run stands still. `culprits` is empty when it cannot be told, `why` says what is known."""

    culprits: tuple[int, ...]
    why: str
    suspects: tuple[int, ...] = ()
    """The ranks that it can be narrowed down to; the culprits where they are known."""


def judge(seen: Mapping[int, Seen], patience: Patience) -> Verdict | None:
    """The verdict over `seen`, by rank; None as long as somebody may still go on by himself."""
    seen = {rank: one for rank, one in seen.items() if one.point != SPARE}
    if stopped := _stopped(seen, patience):
        return stopped
    alive = [one for one in seen.values() if one.process not in GONE]
    silent = [one for one in alive if not one.waits and one.overdue(patience)]
    if len(silent) > 1:  # an accelerator's host does not see what its device waits for
        silent = [one for one in silent if _is_late(one, alive)] or silent
    if silent and len(silent) == len(alive) > 1:
        return _nobody(silent, "every rank computes and none comes on")
    if silent:
        return _culprits(silent, _SILENT)
    return _first_end(alive, seen, patience)


def missed_by(rank: int, seen: Mapping[int, Seen], patience: Patience) -> Verdict | None:
    """Whom `rank` has waited for, which has just given up waiting; None where that cannot be told from `seen`.

    Only who has been silent for as long as `patience` counts: others may have been kept waiting themselves until a moment ago.
    """
    one = seen.get(rank)
    if one is None or not one.waits or not one.overdue(patience):
        return None
    found = _stopped(seen, patience) or _follow(one, seen, patience)
    return found if found and found.culprits and rank not in found.culprits else None


def _stopped(seen: Mapping[int, Seen], patience: Patience) -> Verdict | None:
    stopped = [one for one in seen.values() if one.stopped and one.overdue(patience)]
    return _culprits(stopped, "its process is stopped (SIGSTOP, or a debugger)") if stopped else None


def _first_end(waiting: list[Seen], seen: Mapping[int, Seen], patience: Patience) -> Verdict | None:
    """What the first of the ranks that have waited too long leads to."""
    ends = (_follow(one, seen, patience) for one in waiting if one.waits and one.overdue(patience))
    return next((end for end in ends if end), None)


def _is_late(one: Seen, others: list[Seen]) -> bool:
    """Whether another rank has joined a collective that this one has still to join."""
    return any(
        count > one.counts.get(line, 0)
        for other in others
        for line, count in other.counts.items()
        if one.rank in line.ranks and not line.messages
    )


def _follow(one: Seen, seen: Mapping[int, Seen], patience: Patience) -> Verdict | None:
    """From a rank that waits too long along those that it waits for."""
    if one.silent_seconds >= patience.wait_seconds:
        patience = replace(patience, long_seconds=patience.hang_seconds)
    path = [one]
    while True:
        behind = _behind(one, seen)
        known = [seen[rank] for rank in behind if rank in seen]
        if not behind:
            return _all_have_joined(one, seen, patience)
        if not known:
            if path[0].silent_seconds < 2 * patience.hang_seconds:
                return None  # the watchdog of the node where they are sees more and goes first
            return Verdict((), f"rank {one.rank} {one.doing()}; ranks {_list(behind)} have not joined it and run on another node",
                           tuple(behind))  # fmt: skip
        if gone := [other for other in known if other.process in GONE]:
            return _culprits(gone, "it has ended while others wait for it")
        if any(not other.overdue(patience) for other in known):
            return None
        if computing := [other for other in known if not other.waits]:
            return _culprits(computing, _SILENT)
        one = known[0]
        if one in path:
            return _nobody(path[path.index(one) :], "they wait for each other; they call in different orders")
        path.append(one)


def _behind(one: Seen, seen: Mapping[int, Seen]) -> list[int]:
    """The members of the line that `one` waits in which have not joined its operation. Those of other nodes count as behind
    when nobody here is."""
    assert one.line is not None
    others = [rank for rank in one.line.ranks if rank != one.rank]
    here = [rank for rank in others if rank in seen and seen[rank].counts.get(one.line, 0) < one.number]
    return here or [rank for rank in others if rank not in seen]


def _all_have_joined(one: Seen, seen: Mapping[int, Seen], patience: Patience) -> Verdict | None:
    """Over a rank that waits for an operation which nobody keeps from ending."""
    assert one.line is not None
    members = [seen[rank] for rank in one.line.ranks]
    if any(not member.overdue(patience) for member in members):
        return None
    waiting = [member for member in members if (member.line, member.number) == (one.line, one.number)]
    what = f"{one.operation} number {one.number} in {one.line}"
    if len(waiting) < len(members):
        return _culprits(waiting, f"{what} is over for other ranks, and it does not come back from it: a native deadlock, "
                                  "a thread that keeps Python's lock, or a lost link")  # fmt: skip
    return _nobody(members, f"all have joined {what} and it does not end: the link between them is lost")


def _culprits(ranks: list[Seen], why: str) -> Verdict:
    numbers = tuple(one.rank for one in ranks)
    each = "; ".join(f"rank {one.rank} {one.doing()}" for one in ranks)
    return Verdict(numbers, f"{each}: {why}", numbers)


def _nobody(ranks: list[Seen], why: str) -> Verdict:
    return Verdict((), f"ranks {_list([one.rank for one in ranks])}: {why}", tuple(one.rank for one in ranks))


def _list(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
