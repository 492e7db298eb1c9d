"""Writes rank 0's entries of the ledger: what the rank is doing, as its monitor reports it."""

from bagualu.fault_tolerance.ledger.events import Ledger
from bagualu.fault_tolerance.points import POINTS


class LedgerObserver:
    """Records every change of step or phase: a line of some 150 bytes, about once per step."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._noted = ("", 0)

    def at(self, point: str, step: int) -> None:
        now = (POINTS.get(point, self._noted[0]), step)
        if now != self._noted:
            self._noted = now
            self.ledger.add(*now)

    def waits(self, what: str | None) -> None:
        return None
