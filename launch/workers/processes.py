"""Run a recipe on this machine: as worker processes under torch.distributed.elastic, or as threads of this process."""

import atexit
import contextlib
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed import DistNetworkError
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError, RendezvousTimeoutError

from bagualu.comm import simulated
from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance import run_lock
from bagualu.fault_tolerance.injection.fault import ProcessKilled
from bagualu.fault_tolerance.watchdog.heartbeat import HEARTBEATS, Heartbeat
from bagualu.launch.watch.watcher import Watcher
from bagualu.launch.workers import rendezvous, worker_process
from bagualu.launch.workers.agent import Agent, Killed, Left, LostPeer
from bagualu.launch.workers.agent_messages import LEAVE_SECONDS, Ending, backend_of_all
from bagualu.launch.workers.rendezvous_config import Meeting
from bagualu.launch.workers.restart_policy import Restarts, announcement, resuming
from bagualu.launch.workers.storage_probe import begun
from bagualu.trainer.process import environment
from bagualu.trainer.process.failure import FAILED, Failure, at_fault, failure, first
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.process.worker import train
from bagualu.trainer.recipe.config import Recipe

_TELL_SECONDS = 30
"""For nodes that start later than the one that holds the store, to come and hear why that one was refused."""

_STOPPED_SECONDS = 3
"""For nodes that wait for it, to hear that it was asked to stop; where all of them were, none comes."""


@dataclass(frozen=True)
class Ended:
    """A run's end on this machine: its summary, or the failure after which it was not started again."""

    summary: dict[str, Any] | None = None
    failure: Failure | None = None
    speaks: bool = True
    """Whether rank 0 was here; of several nodes one shows the summary."""


def run_processes(
    recipe: Recipe,
    workers: int,
    entrypoint: str,
    quiet_stdout: bool,
    folder: Path,
    stop: StopRequest,
    meeting: Meeting | None = None,
    watchers: Sequence[Watcher] = (),
) -> Ended:
    """Train with `workers` processes here, and with those of the other nodes of `meeting`.

    `folder` is that of the launch (scratch.py), `stop` is installed, and the fork server is already on its way (forkserver.py).
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the last words are ours
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are the agent's
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "0"  # else elastic opens a store on all interfaces
    if stop():
        ended = _not_begun()
        tell_early(recipe, meeting, ended, stop)
        return ended
    told = worker_process.Member(recipe, tuple(range(workers)), recipe.world_size(), entrypoint, folder, quiet_stdout)
    try:
        place = _place(recipe, meeting, stop)
    except RendezvousError:
        return _not_begun() if stop() else Ended(failure=_no_store(meeting, "meeting the other nodes"))
    except RecipeError as error:
        return refused(error)
    ending = Ending(place.board)
    try:
        with _lock(recipe, meeting, place):
            if meeting:
                _require_same_backend(recipe, place)
                for watcher in watchers if place.hosts else ():
                    watcher.begins()
            return _together(Agent(told, place.handler, stop, watchers), place, ending, meeting)
    except RecipeError as error:  # another job was quicker, or this node is unlike the others
        ended = refused(error)
        if place.hosts or not recipe.restart.elastic:  # the run cannot do without this node
            _tell_early(recipe, place, meeting, ended, stop)
        else:
            ending.leave()
        return ended


def _place(recipe: Recipe, meeting: Meeting | None, stop: StopRequest) -> rendezvous.RendezvousStore:
    """Where the agents meet. Raises RendezvousError, and RecipeError for an address or a port that cannot be used."""
    if meeting:
        return rendezvous.among(meeting, recipe.restart, stop)
    try:
        return rendezvous.here(recipe.launch.port)
    except OSError as error:
        raise RecipeError(f"launch.port={recipe.launch.port} cannot be used ({error.strerror}); "
                          f"give another, or leave it out for a free one") from error  # fmt: skip


def _lock(recipe: Recipe, meeting: Meeting | None, place: rendezvous.RendezvousStore) -> AbstractContextManager[None]:
    """Keep other jobs out of the run directory, on the node that hosts the store. On a single node the caller does it."""
    return run_lock.hold(Path(recipe.run.dir), meeting.job) if meeting and place.hosts else nullcontext()


def _require_same_backend(recipe: Recipe, place: rendezvous.RendezvousStore) -> None:
    """Raises RecipeError on a node whose backend is not that of the others, as comm.backend=auto may make it."""
    own = recipe.comm.backend
    try:
        others = backend_of_all(place.board, own)
    except RuntimeError:  # the store is gone, and the next call that needs it reports that
        return
    if own != others:
        raise RecipeError(f"{socket.gethostname()} has comm.backend={own}, and the nodes before it {others}; give the same "
                          f"comm.backend to all nodes, or GPUs to all or none")  # fmt: skip


def refused(error: RecipeError) -> Ended:
    """The end on a node that cannot take part."""
    return Ended(failure=failure(-1, "start", error, time.time()))


def tell_early(recipe: Recipe, meeting: Meeting | None, ended: Ended, stop: StopRequest) -> None:
    """On a node that ends before it has joined, and without which the run cannot start: let the other nodes know why.

    These are the node that is to hold the store, and every node of a run that is not elastic. Such a node looks for the store for
    _TELL_SECONDS at most.
    """
    with contextlib.suppress(RendezvousError, RecipeError, OSError):
        if meeting and meeting.nodes > 1 and (rendezvous.is_host(meeting) or not recipe.restart.elastic):
            patience = min(recipe.restart.wait_seconds, _TELL_SECONDS)
            place = rendezvous.among(meeting, replace(recipe.restart, wait_seconds=patience), stop)
            if place.hosts or not recipe.restart.elastic:
                _tell_early(recipe, place, meeting, ended, stop)


def _tell_early(
    recipe: Recipe, place: rendezvous.RendezvousStore, meeting: Meeting | None, ended: Ended, stop: StopRequest
) -> None:
    """Tell the other nodes of an end before all of them have joined. The host of the store waits for them, but not for long."""
    _tell(ended, place, ending := Ending(place.board))
    if not (meeting and place.hosts) or ended.failure is None:
        return
    if stop():
        ending.await_leaving(meeting.nodes, _STOPPED_SECONDS)
        return
    print(f"bagualu: telling the other nodes: {ended.failure.cause}", file=sys.stderr, flush=True)
    ending.await_leaving(meeting.nodes, min(recipe.restart.wait_seconds, _TELL_SECONDS), stop)


def _tell(ended: Ended, place: rendezvous.RendezvousStore, ending: Ending) -> None:
    """Tell the agents of the other nodes how the run has ended, and ask nothing of the store from then on."""
    ending.say({"summary": ended.summary, "failure": ended.failure and ended.failure.as_dict()})
    place.handler.shutdown()
    ending.leave()


def _together(agent: Agent, place: rendezvous.RendezvousStore, ending: Ending, meeting: Meeting | None) -> Ended:
    """The end of the run, told to the agents of the other nodes and heard from them."""
    try:
        with agent.suspending():
            ended = _supervise(agent, ending)
    except RendezvousTimeoutError:
        ended = Ended(failure=_nobody_came(agent.told.recipe, place.handler.missing()))
    except (RendezvousError, DistNetworkError):
        ended = Ended(failure=_no_store(meeting, agent.phase))
    stopped = ended.failure is not None and ended.failure.kind == "stopped"
    with contextlib.suppress(Killed):
        if stopped and not place.hosts:  # a node that leaves ends nothing for the others
            ending.leave()
        else:
            _tell(ended, place, ending)
        if place.hosts:  # and leaves last, or the others would lose the store while they still ask
            ending.await_leaving(place.handler.present() if stopped else agent.nodes, LEAVE_SECONDS)
    return ended


def _supervise(agent: Agent, ending: Ending) -> Ended:
    """The end of the run; where another node has ended it, what that one said."""
    if agent.stop_asked:
        return _not_begun()
    try:
        result = agent.run()
    except Killed:
        return _killed()
    except Left:
        return Ended(failure=Failure(-1, "start", "asked to stop while waiting for other nodes", time.time(), "stopped"))
    except RendezvousClosedError:
        result = None
    except LostPeer as lost:
        return Ended(failure=lost.failure)
    except RecipeError as error:
        return Ended(failure=failure(-1, "restart", error, time.time()))
    if result is None:
        return _said(ending.heard())
    if agent.failure and agent.failure.kind == "peer" and result.is_failed() and agent.nodes > 1:
        cause = ending.heard(LEAVE_SECONDS)  # here ranks only lost peers: the node that knows why says it
        return _said(cause) if cause else Ended(failure=agent.failure)
    return Ended(failure=agent.failure) if result.is_failed() else Ended(agent.summary, speaks=agent.has_rank_0)


def _killed() -> Ended:
    cause = "killed by a second Ctrl-C, nothing saved since the last checkpoint"
    return Ended(failure=Failure(-1, "train", cause, time.time(), "killed"))


def _not_begun() -> Ended:
    return Ended(failure=Failure(-1, "start", "asked to stop before anything was trained", time.time(), "stopped"))


def _said(document: dict[str, Any] | None) -> Ended:
    if document is None:
        return Ended(failure=Failure(-1, "restart", "another node has ended the run, and is gone", time.time(), "peer"))
    return Ended(document["summary"], Failure(**document["failure"]) if document["failure"] else None, False)


def _nobody_came(recipe: Recipe, missing: list[str]) -> Failure:
    cause = f"waited restart.wait_seconds={recipe.restart.wait_seconds} s for {recipe.launch.nodes} nodes, and they did not come"
    if missing:
        cause += f"; gone since they last met: {', '.join(missing)}"
    return Failure(-1, "meeting the other nodes", cause, time.time(), "peer")


def _no_store(meeting: Meeting | None, phase: str) -> Failure:
    place = f", {meeting.host} at port {meeting.port}," if meeting else ""
    cause = f"the node that holds the rendezvous store{place} cannot be reached"
    return Failure(-1, phase, cause, time.time(), "peer")


def run_threads(
    recipe: Recipe,
    world: int,
    entrypoint: str,
    quiet_stdout: bool,
    folder: Path,
    stop: StopRequest,
    watchers: Sequence[Watcher] = (),
) -> Ended:
    """Train with `world` threads of this process (comm.backend=simulated). `folder` and `stop` as in `run_processes`."""
    restarts, generation = Restarts(recipe.restart), 0
    if stop():
        return _not_begun()
    with contextlib.redirect_stdout(sys.stderr if quiet_stdout else sys.stdout):
        while True:
            for watcher in watchers:
                watcher.started(generation, dict.fromkeys(range(world), os.getpid()))
            try:
                ended = _run_threads_once(resuming(recipe) if generation else recipe, world, entrypoint, stop, folder, watchers)
            except KeyboardInterrupt:
                atexit.register(_leave_threads)
                return _killed()
            if ended.failure is None:
                return ended
            verdict = restarts.decide(ended.failure)
            again = verdict.again and not stop()
            for watcher in watchers:
                watcher.failed(generation, verdict.failure, again)
            if not again:
                return Ended(failure=verdict.failure)
            print(f"bagualu: {announcement(verdict, restarts, recipe, begun(folder))}", file=sys.stderr, flush=True)
            time.sleep(verdict.pause_seconds)
            generation += 1


def _leave_threads() -> None:
    """End the process with ranks at work in it: the interpreter would abort when it takes itself from under them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILED)


def _run_threads_once(
    recipe: Recipe, world: int, entrypoint: str, stop: StopRequest, folder: Path, watchers: Sequence[Watcher]
) -> Ended:
    failures: list[Failure] = []

    def rank_main(communicator: Communicator) -> dict[str, Any]:
        Heartbeat(folder / HEARTBEATS, communicator.rank, communicator.monitor)
        return train(recipe, communicator, stop, failures.append, entrypoint, folder)

    seen: list[Failure] = []

    def hung() -> str | None:
        seen.extend(failure for watcher in watchers if (failure := watcher.look()))
        return seen[0].cause if seen else None

    threads = environment.threads(recipe.launch, world)
    try:
        return Ended(summary=simulated.run(world, rank_main, recipe.comm.timeout_seconds, threads, hung, recipe.comm.device)[0])
    except (Exception, ProcessKilled) as error:
        if not isinstance(error, RecipeError):  # which is all there is to say
            traceback.print_exception(error)
        return Ended(failure=seen[0] if seen else at_fault(first(failures), not recipe.restart.hang_seconds))
