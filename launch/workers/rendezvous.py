"""Makes the rendezvous through which a run's agents find each other: torch elastic's, over a TCP store."""

import contextlib
import errno
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousTimeout

from bagualu.comm.errors import RecipeError
from bagualu.comm.interface import LOOPBACK, addresses_towards
from bagualu.comm.store import PrefixStore, TCPStore, serve
from bagualu.fault_tolerance.config import RestartConfig
from bagualu.launch.workers.agent_messages import Board
from bagualu.launch.workers.elastic_private import NodeRendezvous, SignedBackend
from bagualu.launch.workers.rendezvous_config import Meeting
from bagualu.launch.workers.secret import Seal, of_this_process

REGROUP_SECONDS = 300
"""The most seconds that the workers get to save and stop when a waiting node is to join."""
_HEARTBEAT_SECONDS, _MISSED_HEARTBEATS = 1, 8
SILENT_SECONDS = _HEARTBEAT_SECONDS * _MISSED_HEARTBEATS
"""An agent that has sent no heartbeat for this long is considered dead."""
_STORE_SECONDS = 30
"""Silence after which the machine with the store, which all agents need, is considered dead. Also the timeout of store calls."""
_ANSWER_SECONDS = 10
"""How long a store that accepts connections may take to answer its first request."""
_FOREVER_SECONDS = 10**8


@dataclass(frozen=True)
class RendezvousStore:
    """A rendezvous, and the board for messages that all its rounds share."""

    handler: NodeRendezvous
    board: Board
    hosts: bool
    """Whether this process hosts the store."""


def on_this_machine(port: int | None) -> RendezvousStore:
    """Returns a rendezvous for this machine alone, at its loopback address. `port`: None for a free port. Raises OSError when the
    port is taken."""
    store = serve(LOOPBACK, port or 0, timedelta(seconds=_STORE_SECONDS))
    run_id = uuid.uuid4().hex
    seal = Seal(of_this_process(), run_id)
    return _rendezvous_store(store, True, LOOPBACK, LOOPBACK, seal, run_id, 1, 1, _FOREVER_SECONDS, 1)


def among(meeting: Meeting, config: RestartConfig, stop: Callable[[], bool]) -> RendezvousStore:
    """Returns the rendezvous of `meeting`. This process hosts its store if this machine is the host.

    Raises RendezvousError when the store cannot be reached within restart.wait_seconds, or `stop()` becomes true before;
    RecipeError when the store cannot listen at its port; OSError when the host's name is unknown or no route leads there.
    """
    join, last_call = config.wait_seconds, 1
    if config.elastic:
        join, last_call = config.wait_seconds + REGROUP_SECONDS, config.wait_seconds
    own_address, its_address = addresses_towards(meeting.host, meeting.port)
    hosted = _hosted(meeting.port, its_address) if own_address == its_address else None
    store = hosted or _reached(meeting, its_address, config.wait_seconds, stop)
    seal, nodes = Seal(meeting.secret, meeting.id), (meeting.fewest, meeting.nodes)
    return _rendezvous_store(store, hosted is not None, its_address, own_address, seal, meeting.id, *nodes, join, last_call)


def is_host(meeting: Meeting) -> bool:
    """Returns whether this machine is the host of the meeting. Raises OSError when the host's name is unknown or no route leads
    there."""
    own_address, its_address = addresses_towards(meeting.host, meeting.port)
    return own_address == its_address  # elastic compares names, which may stand for another address of this machine


def _hosted(port: int, address: str) -> TCPStore | None:
    """Returns a store hosted by this process; None when another process of this machine already uses the port.

    Raises RecipeError when the store cannot listen there for another reason.
    """
    try:
        return serve(address, port, timedelta(seconds=_STORE_SECONDS))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise RecipeError(f"the rendezvous store cannot listen at {address} port {port} ({error.strerror}); "
                          f"give --meet another port") from error  # fmt: skip


def _reached(meeting: Meeting, address: str, wait_seconds: float, stop: Callable[[], bool]) -> TCPStore:
    """Returns a connection to the store that another process hosts. Raises RendezvousConnectionError if there is none after
    `wait_seconds`, or once `stop()` is true."""
    deadline = time.monotonic() + wait_seconds
    while True:
        _await_host(address, meeting.port, deadline, stop)
        with contextlib.suppress(RuntimeError):  # the host has gone in the meantime
            store = TCPStore(address, meeting.port, is_master=False, timeout=timedelta(seconds=_ANSWER_SECONDS))
            store.set_timeout(timedelta(seconds=_STORE_SECONDS))
            return store


def _await_host(host: str, port: int, deadline: float, stop: Callable[[], bool]) -> None:
    """Wait until a process listens at host:port; the machine with the store may start last. Raises RendezvousConnectionError after
    `deadline` or once `stop()` is true. torch's own wait ignores signals."""
    while not stop() and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        time.sleep(0.2)
    raise RendezvousConnectionError(f"no process listens at {host}:{port}")


def _rendezvous_store(
    store: TCPStore,
    hosts: bool,
    address: str,
    own_address: str,
    seal: Seal,
    run_id: str,
    fewest: int,
    most: int,
    join: int,
    last_call: int,
) -> RendezvousStore:
    port = store.port
    _notice_silence(port)
    timeout = RendezvousTimeout(join=timedelta(seconds=join), last_call=timedelta(seconds=last_call))
    beats = _HEARTBEAT_SECONDS, _MISSED_HEARTBEATS
    backend = SignedBackend(store, run_id, seal)
    handler = NodeRendezvous.from_backend(run_id, store, backend, fewest, most, own_address, timeout, *beats)
    handler.share(store, address, port, seal)
    part = f"bagualu/{run_id}"
    return RendezvousStore(handler, Board(PrefixStore(part, store), seal, part), hosts)


def _notice_silence(port: int) -> None:
    """Make this process's connections to `port` fail when the other machine acknowledges nothing for _STORE_SECONDS.

    A machine that loses power does not close its connections; by default the kernel waits a quarter of an hour for it.
    """
    if not hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        return
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # no socket, or one without a peer
            connection = socket.socket(fileno=descriptor)
            try:
                if connection.type == socket.SOCK_STREAM and connection.getpeername()[1:2] == (port,):
                    _limit_silence(connection)
            finally:
                connection.detach()  # torch owns the descriptor


def _limit_silence(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # detects silence even when this side sends nothing
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _HEARTBEAT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _HEARTBEAT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _STORE_SECONDS)
