"""What a rank is doing: its step, the point it has come to, and the communication it waits for.

The one place that knows. Whoever wants to know too (a watchdog, a ledger, a planned fault) observes it. Free of torch.
"""

from typing import Protocol


class Observer(Protocol):
    """Told of every change, on the rank's own thread. What it raises leaves from the place that the rank has come to."""

    def at(self, point: str, step: int) -> None:
        """The rank has come to `point` of `step`."""

    def waits(self, what: str | None) -> None:
        """The rank begins to wait for others, e.g. "all_reduce in data"; None: it waits no longer."""


class Monitor:
    """One rank's. Groups tell it of their collectives; the trainer and the checkpoint code of the points they pass."""

    def __init__(self) -> None:
        self.step = 0
        """The step under way, from 1; 0 before the first."""
        self.point = "start"
        self.observers: list[Observer] = []

    def at(self, point: str) -> None:
        """The rank has come to `point`, e.g. "backward"."""
        self.point = point
        for observer in self.observers:
            observer.at(point, self.step)

    def waits(self, what: str | None) -> None:
        """As `Observer.waits`."""
        for observer in self.observers:
            observer.waits(what)
