"""Where the agents of a run meet: elastic's rendezvous over a TCP store, on one machine or on many."""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout, _NodeDesc

from bagualu.fault_tolerance.config import RestartConfig
from bagualu.launch.meeting import Meeting

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


class Nodes(DynamicRendezvousHandler):
    """Elastic's rendezvous, which also knows who of the last round is missing now."""

    _met: frozenset[_NodeDesc] = frozenset()

    def _get_world(self) -> tuple[int, int]:
        self._met = frozenset(self._state_holder.state.participants)  # before one of them can fall silent
        return super()._get_world()

    def missing(self) -> list[str]:
        """Addresses of other nodes of the last round whose agents are silent or have left, and have not come to the next one."""
        heard = self._state_holder.state.last_heartbeats.keys()  # read anew every second, to tell the others that this node lives
        return sorted(node.addr for node in self._met - heard - {self._this_node})

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


@dataclass(frozen=True)
class Place:
    """A rendezvous, and a store that all its rounds share."""

    handler: Nodes
    store: Store
    hosts: bool
    """Whether the store is this process's."""


def here(port: int | None) -> Place:
    """The rendezvous of one machine."""
    return _place("127.0.0.1", port or 0, uuid.uuid4().hex, 1, 1, "127.0.0.1", True, _FOREVER_SECONDS, 1)


def among(meeting: Meeting, config: RestartConfig, stop: Callable[[], bool]) -> Place:
    """The rendezvous of `meeting`. Raises RendezvousError when its host is not reached in time, or before, when asked to stop."""
    join, last_call = config.wait_seconds, 1
    if config.elastic:
        join, last_call = config.wait_seconds + REGROUP_SECONDS, config.wait_seconds
    host, port = meeting.host, meeting.port
    own_address, its_address = _addresses_towards(host, port)

    def place(is_host: bool) -> Place:
        return _place(host, port, meeting.id, meeting.fewest, meeting.nodes, own_address, is_host, join, last_call)

    if own_address == its_address:  # elastic compares names, which may stand for another address of this machine
        with contextlib.suppress(RendezvousConnectionError):
            return place(is_host=True)
    deadline = time.monotonic() + config.wait_seconds
    while True:
        _await_host(host, port, deadline, stop)
        with contextlib.suppress(RendezvousConnectionError):  # it went again that very moment
            return place(is_host=False)  # another agent of this machine may be there already


def _await_host(host: str, port: int, deadline: float, stop: Callable[[], bool]) -> None:
    """Until somebody listens there: the machine with the store may be the last to come up. Torch would wait deaf to signals."""
    while not stop() and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        time.sleep(0.2)
    raise RendezvousConnectionError(f"nobody listens at {host}:{port}")


def _place(
    host: str, port: int, run_id: str, fewest: int, most: int, own_address: str, is_host: bool, join: int, last_call: int
) -> Place:
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"{host}:{port}",
        run_id=run_id,
        min_nodes=fewest,
        max_nodes=most,
        is_host=is_host,
        read_timeout=_ANSWER_SECONDS,
    )
    backend, store = create_backend(parameters)
    store.set_timeout(timedelta(seconds=_STORE_SECONDS))
    _notice_silence(port)
    timeout = RendezvousTimeout(join=timedelta(seconds=join), last_call=timedelta(seconds=last_call))
    beats = _HEARTBEAT_SECONDS, _MISSED_HEARTBEATS
    handler = Nodes.from_backend(run_id, store, backend, fewest, most, own_address, timeout, *beats)
    return Place(handler, PrefixStore(f"bagualu/{run_id}", store), is_host)


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


def _addresses_towards(host: str, port: int) -> tuple[str, str]:
    """This machine's address on the way to `host`, and that of `host`; nothing is sent. Names of nodes need not resolve."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0]), str(probe.getpeername()[0])
