"""Where the agents of a run meet: elastic's rendezvous over a TCP store, on one machine or on many."""

import contextlib
import errno
import os
import socket
import time
import uuid
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout, Token, _NodeDesc

from bagualu.comm.errors import RecipeError
from bagualu.comm.interface import LOOPBACK, addresses_towards
from bagualu.comm.store import PrefixStore, Store, TCPStore, serve
from bagualu.fault_tolerance.config import RestartConfig
from bagualu.launch.workers.agent_messages import Board
from bagualu.launch.workers.rendezvous_config import Meeting
from bagualu.launch.workers.secret import Seal, of_this_process

REGROUP_SECONDS = 300
"""For the workers to save and stop, so that a node that has come can join."""
_HEARTBEAT_SECONDS, _MISSED_HEARTBEATS = 1, 8
SILENT_SECONDS = _HEARTBEAT_SECONDS * _MISSED_HEARTBEATS
"""An agent that has been silent for so long is dead."""
_STORE_SECONDS = 30
"""The same for the machine with the store, without which nobody goes on; and for a word that an agent owes the others at once."""
_ANSWER_SECONDS = 10
"""For a store that listens to answer for the first time."""
_FOREVER_SECONDS = 10**8


class NodeRendezvous(DynamicRendezvousHandler):
    """Elastic's rendezvous, which also knows who of the last round is missing now, and has one store for agents and workers."""

    _met: frozenset[_NodeDesc] = frozenset()
    seal: Seal
    round: int = 0
    """The round that was met last."""

    def share(self, store: TCPStore, address: str, port: int, seal: Seal) -> None:
        """Give workers the agents' own store, at `address`, in place of another that elastic would open on all interfaces."""
        self._shared_tcp_store_server, self._bootstrap_store_info = store, RendezvousStoreInfo(address, port)
        self.seal = seal

    def _get_store(self) -> Store:
        self.round = self._state_holder.state.round
        store: Store = super()._get_store()
        return store

    def _get_world(self) -> tuple[int, int]:
        self._met = frozenset(self._state_holder.state.participants)  # before one of them can fall silent
        return super()._get_world()

    def missing(self) -> list[str]:
        """Addresses of other nodes of the last round whose agents are silent or have left, and have not come to the next one."""
        heard = self._state_holder.state.last_heartbeats.keys()  # read anew every second, to tell the others that this node lives
        return sorted(node.addr for node in self._met - heard - {self._this_node})

    def present(self) -> int:
        """How many agents are at the rendezvous, this one included."""
        state = self._state_holder.state
        return len({*state.participants, *state.wait_list, self._this_node})

    def _keep_alive(self) -> None:
        """Elastic strikes a node off whose heartbeats it has missed, and that one would never beat again: no blip may do that."""
        super()._keep_alive()
        with self._heartbeat_lock:
            holder = self._state_holder
            if self._this_node in self._met and self._this_node not in holder.state.last_heartbeats:
                holder.state.last_heartbeats[self._this_node] = datetime.now(UTC)
                holder.mark_dirty()
                with contextlib.suppress(RendezvousError):
                    holder.sync()


class SignedBackend(C10dRendezvousBackend):
    """Elastic's state of the rendezvous in a store, where only a state that an agent of the run has signed counts.

    Elastic unpickles the state: one that a stranger could write would run as the user's own program.
    """

    def __init__(self, store: Store, run_id: str, seal: Seal) -> None:
        self._seal = seal
        self._newest: bytes | None = None
        """The newest state that was signed."""
        super().__init__(store, run_id)

    def get_state(self) -> tuple[bytes, Token] | None:
        return self._opened(self._call_store("get", self._key))

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        """Replace the state that was read with `token`; without one, whatever stands there and is not signed."""
        if token is None:
            token = self._call_store("get", self._key)
            if (found := self._opened(token)) is not None:
                return *found, False
        signed = self._seal.sign(self._key, b64encode(state).decode())
        found_there: bytes = self._call_store("compare_set", self._key, token, signed)
        opened = self._opened(found_there)
        return None if opened is None else (*opened, found_there == signed.encode())

    def _opened(self, value: bytes) -> tuple[bytes, Token] | None:
        """The state that `value` is, and the token that stands for `value`; for one that is not signed the state before."""
        if value == self._NULL_SENTINEL.encode():
            return None
        if (text := self._seal.opened(self._key, value)) is not None:
            self._newest = b64decode(text)
        return None if self._newest is None else (self._newest, value)


@dataclass(frozen=True)
class RendezvousStore:
    """A rendezvous, and a board that all its rounds share."""

    handler: NodeRendezvous
    board: Board
    hosts: bool
    """Whether the store is this process's."""


def here(port: int | None) -> RendezvousStore:
    """The rendezvous of one machine, at its loopback address. Raises OSError when the port is taken."""
    store = serve(LOOPBACK, port or 0, timedelta(seconds=_STORE_SECONDS))
    run_id = uuid.uuid4().hex
    seal = Seal(of_this_process(), run_id)
    return _place(store, True, LOOPBACK, LOOPBACK, seal, run_id, 1, 1, _FOREVER_SECONDS, 1)


def among(meeting: Meeting, config: RestartConfig, stop: Callable[[], bool]) -> RendezvousStore:
    """The rendezvous of `meeting`. Raises RendezvousError when its host is not reached in time, or before, when asked to stop."""
    join, last_call = config.wait_seconds, 1
    if config.elastic:
        join, last_call = config.wait_seconds + REGROUP_SECONDS, config.wait_seconds
    own_address, its_address = addresses_towards(meeting.host, meeting.port)
    hosted = _hosted(meeting.port, its_address) if own_address == its_address else None
    store = hosted or _reached(meeting, its_address, config.wait_seconds, stop)
    seal, nodes = Seal(meeting.secret, meeting.id), (meeting.fewest, meeting.nodes)
    return _place(store, hosted is not None, its_address, own_address, seal, meeting.id, *nodes, join, last_call)


def is_host(meeting: Meeting) -> bool:
    """Whether the address of the meeting is this machine's. Raises OSError when there is no way to it."""
    own_address, its_address = addresses_towards(meeting.host, meeting.port)
    return own_address == its_address  # elastic compares names, which may stand for another address of this machine


def _hosted(port: int, address: str) -> TCPStore | None:
    """The store in this process; None: another agent of this machine has it already."""
    try:
        return serve(address, port, timedelta(seconds=_STORE_SECONDS))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise RecipeError(f"the rendezvous store cannot listen at {address} port {port} ({error.strerror}); "
                          f"give --meet another port") from error  # fmt: skip


def _reached(meeting: Meeting, address: str, wait_seconds: float, stop: Callable[[], bool]) -> TCPStore:
    """The store in another process."""
    deadline = time.monotonic() + wait_seconds
    while True:
        _await_host(address, meeting.port, deadline, stop)
        with contextlib.suppress(RuntimeError):  # it went again that very moment
            store = TCPStore(address, meeting.port, is_master=False, timeout=timedelta(seconds=_ANSWER_SECONDS))
            store.set_timeout(timedelta(seconds=_STORE_SECONDS))
            return store


def _await_host(host: str, port: int, deadline: float, stop: Callable[[], bool]) -> None:
    """Until somebody listens there: the machine with the store may be the last to come up. Torch would wait deaf to signals."""
    while not stop() and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        time.sleep(0.2)
    raise RendezvousConnectionError(f"nobody listens at {host}:{port}")


def _place(
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
    """End this process's connections to `port` when the other machine has not acknowledged anything for a while.

    A machine without power says nothing. Without this its store is waited for as long as the kernel likes: a quarter of an hour.
    """
    if not hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        return
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # no socket, or one without a peer
            one = socket.socket(fileno=descriptor)
            try:
                if one.type == socket.SOCK_STREAM and one.getpeername()[1:2] == (port,):
                    _limit_silence(one)
            finally:
                one.detach()  # it is torch's


def _limit_silence(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # also while this side only listens
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _HEARTBEAT_SECONDS)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _HEARTBEAT_SECONDS)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _STORE_SECONDS)
