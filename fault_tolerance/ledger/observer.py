"""Writes rank 0's activities, as its monitor reports them, to the ledger."""

from bagualu.comm.monitor import Phase
from bagualu.fault_tolerance.ledger.events import Ledger


class LedgerObserver:
    """Observes rank 0's monitor and adds an event to `ledger` at every change of step or activity: a line of some 150 bytes, about
    once per step."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._noted = ("", 0)

    def at(self, point: Phase, step: int) -> None:
        now = (point.activity, step)
        if now != self._noted:
            self._noted = now
            self.ledger.add(*now)

    def waits(self, what: str | None) -> None:
        return None
