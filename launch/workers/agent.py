"""The elastic agent of one machine, with our own ways to stop, to fail and to start again.

Elastic answers a signal by killing the workers; ours are asked, save a checkpoint and return. Elastic answers a worker's
death with SIGTERM to the others and up to 30 s of patience; ours cannot go on without it, so they get a moment to tell what
they saw and are killed. Elastic counts restarts; ours are judged one by one (restart.py), go on from the newest checkpoint,
and take the layout that fits the workers there are (fit.py).
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import DistStoreError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, MultiprocessContext

from bagualu.comm.errors import RecipeError
from bagualu.comm.store import Store
from bagualu.fault_tolerance.watchdog.heartbeat import HEARTBEATS
from bagualu.launch.watch.watcher import Watcher
from bagualu.launch.workers import agent_messages, fork_server, worker_process
from bagualu.launch.workers.elastic_layout import fitted
from bagualu.launch.workers.lost_node import LostNode, beats_of, gone, has_begun, where
from bagualu.launch.workers.rendezvous import REGROUP_SECONDS, NodeRendezvous
from bagualu.launch.workers.restart_policy import RestartDecision, Restarts, announcement, resuming
from bagualu.launch.workers.storage_probe import begun
from bagualu.launch.workers.worker_failures import clear_failures, failures
from bagualu.trainer.process.failure import Failure, at_fault, first
from bagualu.trainer.process.stop_request import STOP_SIGNALS, StopRequest

_GRACE_SECONDS = 0.5
"""For the peers of a dead worker, to notice and to write down what they saw."""
_EXIT_SECONDS = 30
"""For the agents of other nodes, when a run is done."""


class Killed(BaseException):
    """A second Ctrl-C: everything ends at once."""


class Left(BaseException):
    """Asked to stop while waiting for other nodes: there is no worker to ask."""


class LostPeer(Exception):
    """Another node has gone before workers started, and the run is not started again."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.cause)
        self.failure = failure


class NoLogs(LogsSpecs):
    """Elastic redirects nothing: workers see to their own output (log.py) and failures (deaths.py)."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nothing = dict.fromkeys(envs, "")
        return LogsDest(dict(nothing), dict(nothing), {}, {}, dict(nothing))

    @property
    def root_log_dir(self) -> str:
        return ""


class Agent(LocalElasticAgent):
    """Starts the workers of one machine, starts them again after failures, forwards requests to stop, lets none survive."""

    def __init__(
        self, told: worker_process.Member, rendezvous: NodeRendezvous, stop: StopRequest, watchers: Sequence[Watcher] = ()
    ) -> None:
        """From here on signals are the agent's, which notes in `stop` that it was asked; `stop` has taken them so far."""
        spec = WorkerSpec(
            role="worker",
            local_world_size=len(told.slots),
            rdzv_handler=rendezvous,
            entrypoint=worker_process.main,
            args=(told,),
            max_restarts=0,  # elastic's own
            monitor_interval=0.1,
        )
        super().__init__(spec, NoLogs(), start_method="forkserver", exit_barrier_timeout=_EXIT_SECONDS)
        self.told = told
        self.watchers = watchers
        self.restarts = Restarts(told.recipe.restart)
        self.generation = 0
        self.failure: Failure | None = None
        """What the last generation that failed has failed of."""
        self.summary: dict[str, Any] | None = None
        """Of the last generation that did not."""
        self._stop = stop
        self._waits_for_nodes = False
        self._interrupts = 0
        self._pids: list[int] = []
        self._lost_node = LostNode(rendezvous, told.scratch)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    @property
    def nodes(self) -> int:
        """Nodes of this generation."""
        return self._worker_group.group_world_size or 1

    @property
    def has_rank_0(self) -> bool:
        return self._worker_group.group_rank == 0

    @property
    def phase(self) -> str:
        """What is under way here."""
        if self._worker_group.state != WorkerState.HEALTHY:
            return "meeting the other nodes"
        beats = beats_of(self._beats, self._ranks())
        return where(max(beat.step if beat else 0 for beat in beats.values()))

    # Being asked to stop

    @property
    def stop_asked(self) -> bool:
        return self._stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._signal_workers(signal.SIGKILL)
            raise Killed
        self._stop.asked = True
        self._signal_workers(signal.SIGTERM)
        if self._waits_for_nodes:
            raise Left

    @contextlib.contextmanager
    def suspending(self) -> Iterator[None]:
        """Inside, Ctrl-Z suspends the workers too."""
        before = signal.getsignal(signal.SIGTSTP)
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGTSTP, self._on_suspend)
        try:
            yield
        finally:
            signal.signal(signal.SIGTSTP, before)

    def _on_suspend(self, number: int, frame: FrameType | None) -> None:
        """The workers are not of the terminal's process group: they are stopped, and go on, with the launcher."""
        self._signal_workers(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._signal_workers(signal.SIGCONT)

    def _signal_workers(self, number: signal.Signals) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # A generation of workers: meeting the other nodes, starting

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        handler = worker_group.spec.rdzv_handler
        assert isinstance(handler, NodeRendezvous)
        self._waits_for_nodes = handler.settings.max_nodes > 1
        try:
            while not self._met(worker_group, handler):
                pass
        finally:
            self._waits_for_nodes = False

    def _met(self, worker_group: WorkerGroup, handler: NodeRendezvous) -> bool:
        """Meet the other nodes; False: one has died before it told the others of its workers, and they are to meet again."""
        try:
            super()._rendezvous(worker_group)
        except DistStoreError as error:
            verdict = self.restarts.decide(gone([], self.phase), elsewhere=True)
            if not verdict.again:
                raise LostPeer(verdict.failure) from error
            _say(announcement(verdict, self.restarts, self.told.recipe, begun(self.told.scratch)))
            self._pause(verdict.pause_seconds)
            return False
        return True

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        world = worker_group.workers[0].world_size
        recipe, training = fitted(self.told.recipe, world)
        if self.generation:
            recipe = resuming(recipe)
        if training != self.told.training and worker_group.group_rank == 0:
            _say(f"going on with {training} ranks of {world} workers: {recipe.validate(training)}")
        self.told = replace(self.told, training=training)
        worker_group.spec.args = (replace(self.told, recipe=recipe, server=fork_server.running(self.told.scratch)),)
        clear_failures(self.told.scratch)
        worker_process.hold(self.told.scratch)
        pids: dict[int, Any] = super()._start_workers(worker_group)
        self._pids = list(pids.values())
        if self.stop_asked:  # before there was anyone to tell
            self._signal_workers(signal.SIGTERM)
        for watcher in self.watchers:
            watcher.started(self.generation, {worker_group.workers[local].global_rank: pid for local, pid in pids.items()})
        return pids

    # Looking after it

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        seen = next(filter(None, (watcher.look() for watcher in self.watchers)), None) or self._lost_node.look(self._ranks())
        failed = seen is not None or bool(self._exit_codes())
        if failed:
            self._fail(worker_group, seen)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed() and not failed:  # a worker has died between that look and this one
            self._fail(worker_group, None)
        if not result.is_failed():
            self._end_spares(worker_group)
        if result.state == WorkerState.SUCCEEDED:
            self.summary = result.return_values[min(result.return_values)]
            if not self.stop_asked and agent_messages.regrouping(self._round_board):
                self._remaining_restarts = 1
                return RunResult(WorkerState.UNHEALTHY)
        return result

    def _fail(self, worker_group: WorkerGroup, seen: Failure | None) -> None:
        """End the generation, of a death or of what a watcher has seen, and decide what follows."""
        deadline = time.monotonic() + (0 if seen else _GRACE_SECONDS)
        while len(self._exit_codes()) < len(self._pids) and time.monotonic() < deadline:
            time.sleep(0.02)
        codes = {worker_group.workers[local].global_rank: code for local, code in self._exit_codes().items()}
        self._signal_workers(signal.SIGKILL)
        for process in self._processes():
            process.join(_EXIT_SECONDS)
        metrics = Path(self.told.recipe.run.dir) / "metrics.jsonl"
        found = seen or first(failures(self.told.scratch, codes, self._ranks(), metrics))
        if found.kind == "peer" and not self.stop_asked and agent_messages.regrouping(self._round_board):
            self._remaining_restarts = 1  # the peer made room for a node that waits
            return
        self.failure = at_fault(found, unwatched=not self.told.recipe.restart.hang_seconds)
        verdict = self._judge(worker_group, self.failure)
        self._remaining_restarts = int(verdict.again)
        self.failure = verdict.failure
        for watcher in self.watchers:
            watcher.failed(self.generation, verdict.failure, verdict.again)
        if verdict.again:
            _say(announcement(verdict, self.restarts, self.told.recipe, begun(self.told.scratch)))
            self._pause(verdict.pause_seconds)

    def _judge(self, worker_group: WorkerGroup, failure: Failure) -> RestartDecision:
        if self.stop_asked:
            return RestartDecision(failure, again=False)
        local = {worker.global_rank: worker.local_rank for worker in worker_group.workers}
        slots = [slot for position, slot in enumerate(self.told.slots) if position != local.get(failure.rank)]
        elsewhere = (failure.kind == "peer" or failure.rank < 0) and self.nodes > 1
        verdict = self.restarts.decide(failure, elsewhere, may_drop=self._can_do_without_one(worker_group, slots))
        if verdict.without_rank:
            self.told = replace(self.told, slots=tuple(slots))
            worker_group.spec.local_world_size = len(slots)
        return verdict

    def _can_do_without_one(self, worker_group: WorkerGroup, slots: list[int]) -> bool:
        """Whether the run can go on when this machine has `slots` only."""
        if not slots or not self.told.recipe.restart.elastic:
            return False
        with contextlib.suppress(RecipeError):
            fitted(self.told.recipe, worker_group.workers[0].world_size - 1)
            return True
        return False

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.stop_asked:
            time.sleep(0.05)

    def _end_spares(self, worker_group: WorkerGroup) -> None:
        """Workers that the layout has no use for wait for those that train, and end when they do."""
        if worker_group.workers[0].world_size == self.told.training:
            return
        training = [worker for worker in worker_group.workers if worker.global_rank < self.told.training]
        assert isinstance(self._pcontext, MultiprocessContext)
        done = self._pcontext._return_values
        if training and all(worker.local_rank in done for worker in training):
            agent_messages.say_trained(self._round_board, done[training[0].local_rank])
        if (summary := agent_messages.trained(self._round_board)) is not None:
            worker_process.release(self.told.scratch, summary)

    # Ending it

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY:  # elastic wants to let in a node that waits
            if self.stop_asked:
                return
            assert self._pcontext is not None
            agent_messages.ask_to_regroup(self._round_board)
            # Before all have begun a step there is nothing to save, and some may wait for a node that is not there any more.
            begun = all(has_begun(self._beats, rank, pid) for rank, pid in self._ranks().items())
            self._signal_workers(signal.SIGTERM if begun else signal.SIGKILL)
            self._pcontext.wait(REGROUP_SECONDS, period=0.05)
        self.generation += 1
        super()._restart_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, *patience: int, **named: int) -> None:
        # Whoever lives still has had the chance to save. Some versions of torch have no timeout here.
        super()._shutdown(signal.SIGKILL, *patience, **named)

    @property
    def _beats(self) -> Path:
        return self.told.scratch / HEARTBEATS

    def _ranks(self) -> dict[int, int]:
        """The processes of the workers here, by rank."""
        return {worker.global_rank: pid for worker, pid in zip(self._worker_group.workers, self._pids, strict=False)}

    @property
    def _round_board(self) -> agent_messages.Board:
        """Shared with the agents of this generation."""
        store, nodes = self._worker_group.store, self._worker_group.spec.rdzv_handler
        assert isinstance(store, Store)
        assert isinstance(nodes, NodeRendezvous)
        return agent_messages.Board(store, nodes.seal, f"{nodes.get_run_id()}/{nodes.round}")

    def _processes(self) -> list[Any]:
        assert isinstance(self._pcontext, MultiprocessContext)
        assert self._pcontext._pc is not None
        return list(self._pcontext._pc.processes)

    def _exit_codes(self) -> dict[int, int]:
        """Return the exit codes of the workers that have failed, by local rank."""
        return {local: process.exitcode for local, process in enumerate(self._processes()) if process.exitcode}


def _say(line: str) -> None:
    print(f"bagualu: {line}", file=sys.stderr, flush=True)
