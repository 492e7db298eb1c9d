"""Where the agents of a run meet: elastic's rendezvous over a TCP store, on one machine or on many."""

import contextlib
import socket
import uuid
from dataclasses import dataclass

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, create_handler

from bagualu.fault_tolerance.config import RestartConfig
from bagualu.launch.meeting import Meeting

REGROUP_SECONDS = 300
"""For the workers to save and stop, so that a node that has come can join."""
_HEARTBEAT_SECONDS, _MISSED_HEARTBEATS = 1, 8
"""An agent that has been silent for the product of them is dead."""
_FOREVER_SECONDS = 10**8


@dataclass(frozen=True)
class Place:
    """A rendezvous, and a store that all its rounds share."""

    handler: DynamicRendezvousHandler
    store: Store
    hosts: bool
    """Whether the store is this process's."""


def here(port: int | None) -> Place:
    """The rendezvous of one machine."""
    return _place("127.0.0.1", port or 0, uuid.uuid4().hex, 1, 1, "127.0.0.1", True, _FOREVER_SECONDS, 1)


def among(meeting: Meeting, config: RestartConfig) -> Place:
    """The rendezvous of `meeting`. Raises RendezvousError when its host cannot be reached."""
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
    return place(is_host=False)  # another agent of this machine may be there already


def _place(
    host: str, port: int, run_id: str, fewest: int, most: int, own_address: str, is_host: bool, join: int, last_call: int
) -> Place:
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"{host}:{port}",
        run_id=run_id,
        min_nodes=fewest,
        max_nodes=most,
        local_addr=own_address,
        join_timeout=join,
        last_call_timeout=last_call,
        keep_alive_interval=_HEARTBEAT_SECONDS,
        keep_alive_max_attempt=_MISSED_HEARTBEATS,
        is_host=is_host,
    )
    backend, store = create_backend(parameters)
    return Place(create_handler(store, backend, parameters), PrefixStore(f"bagualu/{run_id}", store), is_host)


def _addresses_towards(host: str, port: int) -> tuple[str, str]:
    """This machine's address on the way to `host`, and that of `host`; nothing is sent. Names of nodes need not resolve."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0]), str(probe.getpeername()[0])
