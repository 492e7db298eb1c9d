"""What a rank is doing: its step, the point it has come to, and the communication it waits for.

The one place that knows. Whoever wants to know too (a watchdog, a ledger, a planned fault) observes it. Free of torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

Counts: TypeAlias = "list[int] | memoryview[int]"


class Observer(Protocol):
    """Told of every change, on the rank's own thread. What it raises leaves from the place that the rank has come to."""

    def at(self, point: str, step: int) -> None:
        """The rank has come to `point` of `step`."""

    def waits(self, what: str | None) -> None:
        """The rank begins to wait for others, e.g. "all_reduce in data"; None: it waits no longer."""


@dataclass(frozen=True)
class Line:
    """Operations that come one after the other, numbered from 1: a group's collectives, or the messages of one pair in it.

    Operation n cannot end before every member has joined it, so a member whose count is behind is what the others wait for.
    """

    group: str
    ranks: tuple[int, ...]
    """The members; of messages the source and the destination."""
    messages: bool = False

    def __str__(self) -> str:
        return f"{self.group} {self.ranks[0]} -> {self.ranks[1]}" if self.messages else self.group


class Waiting(NamedTuple):
    """What a rank waits for: operation `number` of the line at `line` in `Monitor.lines`."""

    operation: str
    line: int
    number: int


class Monitor:
    """One rank's. Groups tell it of their collectives; the trainer and the checkpoint code of the points they pass."""

    def __init__(self) -> None:
        self.step = 0
        """The step under way, from 1; 0 before the first."""
        self.point = "start"
        self.waiting: Waiting | None = None
        self.observers: list[Observer] = []
        self.lines: list[Line] = []
        self.counts: Counts = [0] * 16
        """Operations that this rank has joined, by line."""
        self.longer: Callable[[Counts], Counts] = lambda counts: [*counts, *[0] * len(counts)]
        """Gives more counts when they are full, with what they hold. With it they can lie in memory that others see."""
        self._index: dict[Line, int] = {}

    def at(self, point: str) -> None:
        """The rank has come to `point`, e.g. "backward"."""
        self.point = point
        for observer in self.observers:
            observer.at(point, self.step)

    def line(self, line: Line) -> int:
        """The place of `line` in `lines` and `counts`."""
        index = self._index.get(line)
        if index is None:
            index = self._index[line] = len(self.lines)
            self.lines.append(line)
            if index == len(self.counts):
                self.counts = self.longer(self.counts)
        return index

    def joins(self, line: int) -> int:
        """The rank joins the next operation of the line at `line`; its number."""
        self.counts[line] = number = self.counts[line] + 1
        return number

    def waits(self, operation: str, line: int, number: int) -> None:
        """The rank begins to wait for that operation to end."""
        self.waiting = Waiting(operation, line, number)
        if self.observers:
            what = f"{operation} in {self.lines[line].group}"
            for observer in self.observers:
                observer.waits(what)

    def goes_on(self) -> None:
        """The rank waits no longer."""
        self.waiting = None
        for observer in self.observers:
            observer.waits(None)
