"""Records what a rank is doing: its step, its phase within the step, and the communication it waits for.

There is no other record of this. Observers (the watchdog, the ledger, planned faults) are called when a phase begins and when
waiting begins or ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeAlias

Counts: TypeAlias = "list[int] | memoryview[int]"


class Phase(StrEnum):
    """A part of a rank's work. Its value is its name in reports and planned faults; `activity` is that to which the ledger adds its
    time."""

    FETCH = "fetch", "start"
    LOAD = "load", "start"
    VERIFY = "verify", "start"
    RESTORE = "restore", "start"
    DATA = "data", "train"
    FORWARD = "forward", "train"
    BACKWARD = "backward", "train"
    BUCKET = "bucket", "train"
    REDUCE = "reduce", "train"
    AGREE = "agree", "train"
    OPTIMIZER = "optimizer", "train"
    DISCARD = "discard", "discarded"
    VALIDATE = "validate", "validation"
    MOVE = "move", "balance"
    MOVED = "moved", "balance"
    WRITE = "write", "checkpoint"
    COMMIT = "commit", "checkpoint"
    PRUNE = "prune", "checkpoint"
    REPLICATE = "replicate", "checkpoint"
    MIRROR = "mirror", "checkpoint"
    PUBLISH = "publish", "checkpoint"

    activity: str
    """The activity to which the ledger adds the phase's time: start, train, discarded, validation, balance or checkpoint."""

    def __new__(cls, name: str, activity: str) -> "Phase":
        member = str.__new__(cls, name)
        member._value_, member.activity = name, activity
        return member


class Observer(Protocol):
    """An object that the monitor calls when a phase begins and when waiting begins or ends, on the thread that reports it.
    Exceptions of its methods reach the rank's code."""

    def at(self, point: Phase, step: int) -> None:
        """Called when the rank begins the phase `point` of `step`."""

    def waits(self, what: str | None) -> None:
        """Called with e.g. "all_reduce in world" (operation and group) when the rank begins to wait for other ranks, and with None
        when the rank stops waiting."""


@dataclass(frozen=True)
class Line:
    """A sequence of operations, numbered from 1: a group's collectives, or the messages from one of its ranks to another.

    A rank that waits for operation n waits for those ranks of the line that have joined fewer than n operations.
    """

    group: str
    ranks: Sequence[int]
    """The group's ranks; for messages, the source and the destination, as global ranks."""
    messages: bool = False

    def __str__(self) -> str:
        return f"{self.group} {self.ranks[0]} -> {self.ranks[1]}" if self.messages else self.group


class Waiting(NamedTuple):
    """What a rank waits for: the operation called `operation` (e.g. "all_reduce"), which is number `number` of
    Monitor.lines[line]."""

    operation: str
    line: int
    number: int


class Monitor:
    """The record of one rank. Groups report their collectives to it; the trainer and the checkpoint code report phases."""

    def __init__(self) -> None:
        self.step = 0
        """The current step, from 1; 0 before the first step."""
        self.point = "start"
        """Name of the phase that began last; "start" before any phase."""
        self.waiting: Waiting | None = None
        self.observers: list[Observer] = []
        self.lines: list[Line] = []
        self.counts: Counts = [0] * 16
        """counts[i] is the number of operations of lines[i] that this rank has joined; entries after the last line are 0."""
        self.grow_counts: Callable[[Counts], Counts] = lambda counts: [*counts, *[0] * len(counts)]
        """Called with `counts` when a new line needs an entry beyond its end; returns a longer copy. An observer that keeps
        `counts` in shared memory replaces this function."""
        self._index: dict[Line, int] = {}

    def at(self, phase: Phase) -> None:
        """Records that the rank begins `phase`."""
        self.point = phase.value
        for observer in self.observers:
            observer.at(phase, self.step)

    def line(self, line: Line) -> int:
        """Returns the index of `line` in `lines` and `counts`, and adds the line to both if it is new."""
        index = self._index.get(line)
        if index is None:
            index = self._index[line] = len(self.lines)
            self.lines.append(line)
            if index == len(self.counts):
                self.counts = self.grow_counts(self.counts)
        return index

    def joins(self, line: int) -> int:
        """Records that the rank joins the next operation of lines[line] and returns the operation's number in that line, from 1."""
        self.counts[line] = number = self.counts[line] + 1
        return number

    def waits(self, operation: str, line: int, number: int) -> None:
        """Records that the rank begins to wait for operation `number` of lines[line] to end."""
        self.waiting = Waiting(operation, line, number)
        if self.observers:
            what = f"{operation} in {self.lines[line].group}"
            for observer in self.observers:
                observer.waits(what)

    def goes_on(self) -> None:
        """Records that the rank has stopped waiting."""
        self.waiting = None
        for observer in self.observers:
            observer.waits(None)
