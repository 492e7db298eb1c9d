"""The agent of one machine: torch elastic's agent, with our own handling of stop requests, failures and restarts.

On a signal, elastic kills the workers; this agent asks them to stop, and they save a checkpoint and return. When a worker dies,
elastic sends SIGTERM to the others and waits up to 30 s; this agent gives them half a second to write down what failed, then kills
them, because training cannot go on without the dead rank. Elastic only counts restarts; this agent decides each one
(restart_policy.py), resumes from the newest checkpoint, and chooses a layout for the workers that are left (elastic_layout.py).
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
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState

from bagualu.comm.errors import RecipeError
from bagualu.comm.store import Store
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.fault_tolerance.watchdog.heartbeat import HEARTBEATS
from bagualu.launch.watch.watcher import Watcher
from bagualu.launch.workers import agent_messages, fork_server, worker_process
from bagualu.launch.workers.elastic_layout import fitted
from bagualu.launch.workers.elastic_private import ElasticAgent, NodeRendezvous
from bagualu.launch.workers.lost_node import LostNode, beats_of, gone, has_begun, where
from bagualu.launch.workers.rendezvous import REGROUP_SECONDS
from bagualu.launch.workers.restart_policy import RestartDecision, Restarts, announcement, resuming
from bagualu.launch.workers.storage_probe import begun
from bagualu.launch.workers.worker_failures import clear_failures, failures
from bagualu.trainer.process.failure import Failure, at_fault, first
from bagualu.trainer.process.stop_request import STOP_SIGNALS, StopRequest

_GRACE_SECONDS = 0.5
"""How long the peers of a dead worker may take to notice its death and write down what failed."""
_EXIT_SECONDS = 30
"""How long to wait at the end of a run for the agents of other nodes, and for each killed worker to exit."""


class Killed(BaseException):
    """Raised after a second Ctrl-C, when the workers have been killed."""


class Left(BaseException):
    """Raised after a request to stop while the agent waits for other nodes and so has no workers that could save."""


class LostPeer(Exception):
    """Another node was lost before the workers started, and the restart policy does not allow another try."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.cause)
        self.failure = failure


class Agent(ElasticAgent):
    """Starts the workers of one machine, restarts them after failures, forwards requests to stop, and leaves no worker behind."""

    def __init__(
        self,
        arguments: worker_process.WorkerArguments,
        rendezvous: NodeRendezvous,
        stop: StopRequest,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        """Replaces the signal handlers that `stop` installed; the agent's own handlers set `stop.asked`.

        Args:
            arguments: the arguments with which every worker of this machine is started.
            rendezvous: the rendezvous through which this agent finds the agents of the other nodes.
            stop: the request to stop; calling it returns whether the run was asked to stop.
            watchers: objects that are called when workers start or fail, and may report failures themselves, such as a hang.
        """
        spec = WorkerSpec(
            role="worker",
            local_world_size=len(arguments.slots),
            rdzv_handler=rendezvous,
            entrypoint=worker_process.main,
            args=(arguments,),
            max_restarts=0,  # elastic's own limit; ours is restart.limit
            monitor_interval=0.1,
        )
        super().__init__(spec, _EXIT_SECONDS)
        self.arguments = arguments
        self.watchers = watchers
        self.restarts = Restarts(arguments.recipe.restart)
        self.generation = 0
        self.failure: Failure | None = None
        """The failure of the latest generation of workers that failed; None if none has."""
        self.summary: dict[str, Any] | None = None
        """The summary of the generation that succeeded; None until then."""
        self._stop = stop
        self._waits_for_nodes = False
        self._interrupts = 0
        self._pids: list[int] = []
        self._lost_node = LostNode(rendezvous, arguments.scratch)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    @property
    def nodes(self) -> int:
        """The number of nodes that take part in this generation; 1 before the nodes have met."""
        return self.group.group_world_size or 1

    @property
    def has_rank_0(self) -> bool:
        return self.group.group_rank == 0

    @property
    def phase(self) -> str:
        """What the workers of this machine are doing, for messages: "start", "step 12", or "meeting the other nodes"."""
        if self.group.state != WorkerState.HEALTHY:
            return "meeting the other nodes"
        beats = beats_of(self._beats, self._ranks())
        return where(max(beat.step if beat else 0 for beat in beats.values()))

    # Requests to stop

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
        """Inside this context, Ctrl-Z suspends the workers as well as this process."""
        before = signal.getsignal(signal.SIGTSTP)
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGTSTP, self._on_suspend)
        try:
            yield
        finally:
            signal.signal(signal.SIGTSTP, before)

    def _on_suspend(self, number: int, frame: FrameType | None) -> None:
        """Suspend the workers, then this process; continue the workers when this process continues. They are not in the terminal's
        process group, so Ctrl-Z does not reach them."""
        self._signal_workers(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._signal_workers(signal.SIGCONT)

    def _signal_workers(self, number: signal.Signals) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # Starting a generation of workers: the rendezvous with the other nodes, then the processes

    def meet(self) -> None:
        handler = self.group.spec.rdzv_handler
        assert isinstance(handler, NodeRendezvous)
        self._waits_for_nodes = handler.settings.max_nodes > 1
        try:
            while not self._try_to_meet():
                pass
        finally:
            self._waits_for_nodes = False

    def _try_to_meet(self) -> bool:
        """Meet the other nodes. Returns False if the rendezvous must be repeated, because a node died before it announced its
        workers.

        Such a death counts as a failure. Raises LostPeer when the restart policy does not allow another try.
        """
        try:
            super().meet()
        except DistStoreError as error:
            verdict = self.restarts.decide(gone([], self.phase), elsewhere=True)
            if not verdict.again:
                raise LostPeer(verdict.failure) from error
            _say(announcement(verdict, self.restarts, self.arguments.recipe, begun(self.arguments.scratch)))
            self._pause(verdict.pause_seconds)
            return False
        return True

    def start(self) -> dict[int, int]:
        world = self.group.workers[0].world_size
        recipe, training = fitted(self.arguments.recipe, world)
        if self.generation:
            recipe = resuming(recipe)
        if training != self.arguments.training and self.group.group_rank == 0:
            _say(f"going on with {training} ranks of {world} workers: {recipe.validate(training)}")
        self.arguments = replace(self.arguments, training=training)
        self.group.spec.args = (replace(self.arguments, recipe=recipe, server=fork_server.running(self.arguments.scratch)),)
        clear_failures(self.arguments.scratch)
        worker_process.hold(self.arguments.scratch)
        pids = super().start()
        self._pids = list(pids.values())
        if self.stop_asked:  # the request came before there were workers to signal
            self._signal_workers(signal.SIGTERM)
        for watcher in self.watchers:
            watcher.started(self.generation, {self.group.workers[local].global_rank: pid for local, pid in pids.items()})
        return pids

    # Watching the generation

    def look(self) -> RunResult:
        seen = next(filter(None, (watcher.look() for watcher in self.watchers)), None) or self._lost_node.look(self._ranks())
        failed = seen is not None or bool(self._exit_codes())
        if failed:
            self._fail(seen)
        result = super().look()
        if result.is_failed() and not failed:  # a worker has died between that look and this one
            self._fail(None)
        if not result.is_failed():
            self._end_spares()
        if result.state == WorkerState.SUCCEEDED:
            self.summary = result.return_values[min(result.return_values)]
            if not self.stop_asked and agent_messages.regrouping(self._messages):
                self.allow_restart(True)
                return RunResult(WorkerState.UNHEALTHY)
        return result

    def _fail(self, seen: Failure | None) -> None:
        """Kill all workers of this machine after a worker's death, or after the failure `seen` that a watcher reported, and decide
        whether they are restarted. If the workers were only stopping to let a waiting node join, they are, and nothing counts as a
        failure."""
        deadline = time.monotonic() + (0 if seen else _GRACE_SECONDS)
        while len(self._exit_codes()) < len(self._pids) and time.monotonic() < deadline:
            time.sleep(0.02)
        codes = {self.group.workers[local].global_rank: code for local, code in self._exit_codes().items()}
        self._signal_workers(signal.SIGKILL)
        for process in self.processes():
            process.join(_EXIT_SECONDS)
        metrics = RunDirectory(self.arguments.recipe.run.dir).metrics
        failure = seen or first(failures(self.arguments.scratch, codes, self._ranks(), metrics))
        if failure.kind == "peer" and not self.stop_asked and agent_messages.regrouping(self._messages):
            self.allow_restart(True)  # the peer stopped to let a waiting node join
            return
        self.failure = at_fault(failure, unwatched=not self.arguments.recipe.restart.hang_seconds)
        verdict = self._judge(self.failure)
        self.allow_restart(verdict.again)
        self.failure = verdict.failure
        for watcher in self.watchers:
            watcher.failed(self.generation, verdict.failure, verdict.again)
        if verdict.again:
            _say(announcement(verdict, self.restarts, self.arguments.recipe, begun(self.arguments.scratch)))
            self._pause(verdict.pause_seconds)

    def _judge(self, failure: Failure) -> RestartDecision:
        if self.stop_asked:
            return RestartDecision(failure, again=False)
        local = {worker.global_rank: worker.local_rank for worker in self.group.workers}
        slots = [slot for position, slot in enumerate(self.arguments.slots) if position != local.get(failure.rank)]
        elsewhere = (failure.kind == "peer" or failure.rank < 0) and self.nodes > 1
        verdict = self.restarts.decide(failure, elsewhere, may_drop=self._can_do_without_one(slots))
        if verdict.without_rank:
            self.arguments = replace(self.arguments, slots=tuple(slots))
            self.group.spec.local_world_size = len(slots)
        return verdict

    def _can_do_without_one(self, slots: list[int]) -> bool:
        """Returns whether the run can go on with one worker fewer; `slots` are the slots that this machine would keep."""
        if not slots or not self.arguments.recipe.restart.elastic:
            return False
        with contextlib.suppress(RecipeError):
            fitted(self.arguments.recipe, self.group.workers[0].world_size - 1)
            return True
        return False

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.stop_asked:
            time.sleep(0.05)

    def _end_spares(self) -> None:
        """Let the spare workers of this machine, which the layout does not use, end once the ranks that train have finished."""
        if self.group.workers[0].world_size == self.arguments.training:
            return
        training = [worker for worker in self.group.workers if worker.global_rank < self.arguments.training]
        done = self.returned()
        if training and all(worker.local_rank in done for worker in training):
            agent_messages.say_trained(self._messages, done[training[0].local_rank])
        if (summary := agent_messages.trained(self._messages)) is not None:
            worker_process.release(self.arguments.scratch, summary)

    # Ending the generation

    def restart(self) -> None:
        if self.group.state == WorkerState.HEALTHY:  # elastic restarts healthy workers to let a waiting node join
            if self.stop_asked:
                return
            agent_messages.ask_to_regroup(self._messages)
            # Before every rank has begun a step there is nothing to save, and some may be waiting for a node that is gone.
            begun = all(has_begun(self._beats, rank, pid) for rank, pid in self._ranks().items())
            self._signal_workers(signal.SIGTERM if begun else signal.SIGKILL)
            self.await_workers(REGROUP_SECONDS)
        self.generation += 1
        super().restart()

    @property
    def _beats(self) -> Path:
        return self.arguments.scratch / HEARTBEATS

    def _ranks(self) -> dict[int, int]:
        """Returns the process ids of the workers of this machine, by global rank."""
        return {worker.global_rank: pid for worker, pid in zip(self.group.workers, self._pids, strict=False)}

    @property
    def _messages(self) -> agent_messages.Board:
        """The board for messages between the agents of this generation."""
        store, nodes = self.group.store, self.group.spec.rdzv_handler
        assert isinstance(store, Store)
        assert isinstance(nodes, NodeRendezvous)
        return agent_messages.Board(store, nodes.seal, f"{nodes.get_run_id()}/{nodes.round}")

    def _exit_codes(self) -> dict[int, int]:
        """Returns the exit codes other than 0 of the workers of this machine that have ended, by local rank."""
        return {local: process.exitcode for local, process in enumerate(self.processes()) if process.exitcode}


def _say(line: str) -> None:
    print(f"bagualu: {line}", file=sys.stderr, flush=True)
