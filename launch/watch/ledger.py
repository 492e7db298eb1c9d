"""Writes the launcher's events to a run's ledger: the launch, and the starts and failures of workers."""

import secrets
from collections.abc import Mapping
from pathlib import Path

from bagualu.fault_tolerance.ledger.events import Ledger, Moment
from bagualu.launch.watch.watcher import Watcher
from bagualu.trainer.process.failure import Failure


class LedgerWatcher(Watcher):
    """Records in the ledger when the launch began and when workers started and failed. Only the launcher on the node with rank 0
    writes."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._writer = secrets.token_hex(4)
        self._began: Moment | None = Moment.now()
        self._ledger: Ledger | None = None

    def started(self, generation: int, pids: Mapping[int, int]) -> None:
        if 0 not in pids:
            self._ledger = None
            return
        self._ledger = self._ledger or Ledger(self._run_dir, writer=self._writer)
        if self._began is not None and generation == 0:
            self._ledger.add("launched", moment=self._began)
        self._began = None
        self._ledger.add("started")

    def look(self) -> None:
        if self._ledger is not None:
            self._ledger.write()

    def failed(self, generation: int, failure: Failure, again: bool) -> None:
        if self._ledger is None:
            return
        self._ledger.add("failed", failure.step, failure.time, failure.rank, failure.cause)
        if not again:
            self._ledger.add("ended", cause="failed")
