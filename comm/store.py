"""The stores in which processes find each other: who listens, and on which address."""

import socket
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from bagualu.comm.world import World

_BACKLOG = 4096
"""Connections that may wait to be accepted while many processes start at once."""


def serve(address: str, port: int, timeout: timedelta) -> TCPStore:
    """A store in this process that listens on `address` alone; on any free port where `port` is 0.

    By itself torch's store listens on every interface of the machine. Raises OSError when the address cannot be listened on.
    """
    family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server(where[:2], family=family, backlog=_BACKLOG)
    port = listener.getsockname()[1]
    return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach())


def store_of(world: World, timeout: timedelta) -> Store:
    """The store where the processes of `world` find each other. Raises RuntimeError, OSError."""
    if world.serves:
        return serve(*world.serves, timeout)
    store: Store = next(rendezvous(world.rendezvous, world.rank, world.size, timeout=timeout))[0]
    return store
