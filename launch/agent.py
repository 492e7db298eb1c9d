"""The elastic agent of one machine, with our own ways to stop and to fail.

Elastic answers a signal by killing the workers; ours are asked, save a checkpoint and return. Elastic answers a worker's
death with SIGTERM to the others and up to 30 s of patience; ours cannot go on without it, so they get a moment to tell what
they saw and are killed.
"""

import contextlib
import os
import signal
import time
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, MultiprocessContext

from bagualu.trainer.stopping import STOP_SIGNALS

_GRACE_SECONDS = 3.0
"""For the peers of a dead worker, to notice and to write down what they saw."""


class Killed(BaseException):
    """A second Ctrl-C: everything ends at once."""


class NoLogs(LogsSpecs):
    """Elastic redirects nothing: workers see to their own output (log.py) and failures (member.py)."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nothing = dict.fromkeys(envs, "")
        return LogsDest(dict(nothing), dict(nothing), {}, {}, dict(nothing))

    @property
    def root_log_dir(self) -> str:
        return ""


class Agent(LocalElasticAgent):
    """Starts the workers of one machine, forwards requests to stop, sees to it that none survives."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec, NoLogs(), start_method="forkserver")
        self.exit_codes: dict[int, int] = {}
        """Of the workers that failed by themselves, by rank."""
        self.stop_asked = False
        self._interrupts = 0
        self._pids: list[int] = []
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._signal_workers(signal.SIGKILL)
            raise Killed
        self.stop_asked = True
        self._signal_workers(signal.SIGTERM)

    def _signal_workers(self, number: signal.Signals) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids: dict[int, Any] = super()._start_workers(worker_group)
        self._pids = list(pids.values())
        if self.stop_asked:  # before there was anyone to tell
            self._signal_workers(signal.SIGTERM)
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._failed():
            deadline = time.monotonic() + _GRACE_SECONDS
            while len(self._failed()) < len(self._pids) and time.monotonic() < deadline:
                time.sleep(0.05)
            self.exit_codes = {worker_group.workers[rank].global_rank: code for rank, code in self._failed().items()}
            self._signal_workers(signal.SIGKILL)
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _failed(self) -> dict[int, int]:
        """Exit codes of the workers that have ended badly, by local rank."""
        assert isinstance(self._pcontext, MultiprocessContext)
        assert self._pcontext._pc is not None
        codes = [process.exitcode for process in self._pcontext._pc.processes]
        return {rank: code for rank, code in enumerate(codes) if code}
