"""Runs a recipe on this machine as worker processes under torch.distributed.elastic."""

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed import DistNetworkError
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError, RendezvousTimeoutError

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance import run_lock
from bagualu.launch.watch.watcher import Watcher
from bagualu.launch.workers import rendezvous, worker_process
from bagualu.launch.workers.agent import Agent, Killed, Left, LostPeer
from bagualu.launch.workers.agent_messages import LEAVE_SECONDS, Ending, backend_of_all
from bagualu.launch.workers.ended import Ended, killed, not_begun, refused
from bagualu.launch.workers.rendezvous_config import Meeting
from bagualu.trainer.process.failure import Failure, failure
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe.config import Recipe

_TELL_SECONDS = 30
"""How long the store's host, if it cannot take part in the run, waits at most for the other nodes to read the reason. Also how
long a node that cannot take part looks for the store."""

_STOPPED_SECONDS = 3
"""How long the store's host, if it was asked to stop before all nodes had joined, waits for the other nodes to read that. If all
nodes were asked to stop, none of them reads it."""


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
    """Train with `workers` processes here and those of the other nodes of `meeting`, and return how the run ended.

    The caller has installed `stop` and started the fork server (fork_server.py). `folder` is the launch's scratch folder.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # failures are printed by the launcher
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the agent handles the other signals
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "0"  # with 1, elastic opens a second store on all interfaces
    if stop():
        ended = not_begun()
        tell_early(recipe, meeting, ended, stop)
        return ended
    arguments = worker_process.WorkerArguments(recipe, tuple(range(workers)), recipe.world_size(), entrypoint, folder, quiet_stdout)
    try:
        store = _open_store(recipe, meeting, stop)
    except RendezvousError:
        return not_begun() if stop() else Ended(failure=_no_store(meeting, "meeting the other nodes"))
    except RecipeError as error:
        return refused(error)
    ending = Ending(store.board)
    try:
        with _lock(recipe, meeting, store):
            if meeting:
                _require_same_backend(recipe, store)
                for watcher in watchers if store.hosts else ():
                    watcher.begins()
            return _run_agent(Agent(arguments, store.handler, stop, watchers), store, ending, meeting)
    except RecipeError as error:  # another job holds the run directory, or this node's backend differs from the others'
        ended = refused(error)
        if store.hosts or not recipe.restart.elastic:  # the run cannot go on without this node
            _tell_early(recipe, store, meeting, ended, stop)
        else:
            ending.leave()
        return ended


def _open_store(recipe: Recipe, meeting: Meeting | None, stop: StopRequest) -> rendezvous.RendezvousStore:
    """Returns the rendezvous of the run's agents. Raises RendezvousError, and RecipeError for an address or port it cannot use."""
    if meeting:
        return rendezvous.among(meeting, recipe.restart, stop)
    try:
        return rendezvous.on_this_machine(recipe.launch.port)
    except OSError as error:
        raise RecipeError(f"launch.port={recipe.launch.port} cannot be used ({error.strerror}); "
                          f"give another, or leave it out for a free one") from error  # fmt: skip


def _lock(recipe: Recipe, meeting: Meeting | None, store: rendezvous.RendezvousStore) -> AbstractContextManager[None]:
    """Returns a context in which other jobs cannot use the run directory, if this node of several hosts the store; else a context
    that does nothing. On a single node the caller takes the lock."""
    return run_lock.hold(Path(recipe.run.dir), meeting.job) if meeting and store.hosts else nullcontext()


def _require_same_backend(recipe: Recipe, store: rendezvous.RendezvousStore) -> None:
    """Raises RecipeError when this node's backend differs from that of the first node, which comm.backend=auto may cause."""
    own = recipe.comm.backend
    try:
        others = backend_of_all(store.board, own)
    except RuntimeError:  # the store is gone; the next call that needs it reports that
        return
    if own != others:
        raise RecipeError(f"{socket.gethostname()} has comm.backend={own}, but the nodes that started before it have {others}; "
                          f"give the same comm.backend to all nodes, or GPUs to all or none")  # fmt: skip


def tell_early(recipe: Recipe, meeting: Meeting | None, ended: Ended, stop: StopRequest) -> None:
    """Tell the other nodes how this node ended before it joined them, if the run cannot start without it.

    That is the node that should host the store, and every node of a run that is not elastic. The node looks for the store for at
    most _TELL_SECONDS.
    """
    with contextlib.suppress(RendezvousError, RecipeError, OSError):
        if meeting and meeting.nodes > 1 and (rendezvous.is_host(meeting) or not recipe.restart.elastic):
            patience = min(recipe.restart.wait_seconds, _TELL_SECONDS)
            store = rendezvous.among(meeting, replace(recipe.restart, wait_seconds=patience), stop)
            if store.hosts or not recipe.restart.elastic:
                _tell_early(recipe, store, meeting, ended, stop)


def _tell_early(
    recipe: Recipe, store: rendezvous.RendezvousStore, meeting: Meeting | None, ended: Ended, stop: StopRequest
) -> None:
    """Publish how the run ended before all nodes have joined. The store's host waits a limited time for them to read it."""
    _tell(ended, store, ending := Ending(store.board))
    if not (meeting and store.hosts) or ended.failure is None:
        return
    if stop():
        ending.await_leaving(meeting.nodes, _STOPPED_SECONDS)
        return
    print(f"bagualu: telling the other nodes: {ended.failure.cause}", file=sys.stderr, flush=True)
    ending.await_leaving(meeting.nodes, min(recipe.restart.wait_seconds, _TELL_SECONDS), stop)


def _tell(ended: Ended, store: rendezvous.RendezvousStore, ending: Ending) -> None:
    """Publish to the agents of the other nodes how the run ended, then close the rendezvous and leave its store."""
    ending.say({"summary": ended.summary, "failure": ended.failure and ended.failure.as_dict()})
    store.handler.shutdown()
    ending.leave()


def _run_agent(agent: Agent, store: rendezvous.RendezvousStore, ending: Ending, meeting: Meeting | None) -> Ended:
    """Run the agent until the run ends, tell the other nodes how it ended, and return that. A stopped node that does not host the
    store tells nothing, because the others may go on."""
    try:
        with agent.suspending():
            ended = _supervise(agent, ending)
    except RendezvousTimeoutError:
        ended = Ended(failure=_missing_nodes(agent.arguments.recipe, store.handler.missing()))
    except (RendezvousError, DistNetworkError):
        ended = Ended(failure=_no_store(meeting, agent.phase))
    stopped = ended.failure is not None and ended.failure.kind == "stopped"
    with contextlib.suppress(Killed):
        if stopped and not store.hosts:  # a stopped node that does not host the store does not end the run of the others
            ending.leave()
        else:
            _tell(ended, store, ending)
        if store.hosts:  # the host leaves last, because the others still read from its store
            met = agent.nodes > 1 and not stopped  # else some may be waiting to meet
            ending.await_leaving(agent.nodes if met else store.handler.present(), LEAVE_SECONDS)
    return ended


def _supervise(agent: Agent, ending: Ending) -> Ended:
    """Run the agent and return how the run ended; if another node ended it, return what that node published."""
    if agent.stop_asked:
        return not_begun()
    try:
        result = agent.run()
    except Killed:
        return killed()
    except Left:
        return Ended(failure=Failure(-1, "start", "asked to stop while waiting for other nodes", time.time(), "stopped"))
    except RendezvousClosedError:
        result = None
    except LostPeer as lost:
        return Ended(failure=lost.failure)
    except RecipeError as error:
        return Ended(failure=failure(-1, "restart", error, time.time()))
    if result is None:
        return _published(ending.heard())
    if agent.failure and agent.failure.kind == "peer" and result.is_failed() and agent.nodes > 1:
        cause = ending.heard(LEAVE_SECONDS)  # the ranks here only lost peers; the node with the cause publishes it
        return _published(cause) if cause else Ended(failure=agent.failure)
    return Ended(failure=agent.failure) if result.is_failed() else Ended(agent.summary, prints_summary=agent.has_rank_0)


def _published(document: dict[str, Any] | None) -> Ended:
    if document is None:
        cause = "another node has ended the run, and its reason cannot be read"
        return Ended(failure=Failure(-1, "restart", cause, time.time(), "peer"))
    return Ended(document["summary"], Failure(**document["failure"]) if document["failure"] else None, False)


def _missing_nodes(recipe: Recipe, missing: list[str]) -> Failure:
    cause = (
        f"waited restart.wait_seconds={recipe.restart.wait_seconds} s for {recipe.launch.nodes} nodes, but not all of them joined"
    )
    if missing:
        cause += f"; lost since the last start: {', '.join(missing)}"
    return Failure(-1, "meeting the other nodes", cause, time.time(), "peer")


def _no_store(meeting: Meeting | None, phase: str) -> Failure:
    address = f", {meeting.host} at port {meeting.port}," if meeting else ""
    cause = f"the node that holds the rendezvous store{address} cannot be reached"
    return Failure(-1, phase, cause, time.time(), "peer")
