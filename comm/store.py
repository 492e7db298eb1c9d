"""The stores through which processes find each other, and the addresses at which they listen."""

import socket
from datetime import timedelta

from torch._C._distributed_c10d import HashStore as HashStore
from torch._C._distributed_c10d import PrefixStore as PrefixStore
from torch._C._distributed_c10d import Store as Store
from torch._C._distributed_c10d import TCPStore as TCPStore
from torch.distributed.rendezvous import rendezvous

from bagualu.comm.world import World

_BACKLOG = 4096
"""The number of connections that may wait to be accepted while many processes start at the same time."""


def serve(address: str, port: int, timeout: timedelta) -> TCPStore:
    """Returns a store in this process that listens only on `address`, on a free port if `port` is 0.

    A store that torch opens itself would listen on all interfaces of the machine. Raises OSError if it cannot listen on `address`.
    """
    family, _, _, _, socket_address = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server(socket_address[:2], family=family, backlog=_BACKLOG)
    port = listener.getsockname()[1]
    return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach())


def store_of(world: World, timeout: timedelta) -> Store:
    """Returns the store through which the processes of `world` find each other. Raises RuntimeError or OSError if this process
    cannot serve or reach the store."""
    if world.serves:
        return serve(*world.serves, timeout)
    store: Store = next(rendezvous(world.rendezvous, world.rank, world.size, timeout=timeout))[0]
    return store
