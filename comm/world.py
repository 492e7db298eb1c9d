"""This process's rank among all processes. No other file of `comm` reads the launcher's environment variables."""

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.comm.interface import LOOPBACK, addresses_towards, interface_of

ENVIRONMENT = "env://"
"""The rendezvous for processes that find each other through the launcher's environment variables."""


@dataclass(frozen=True)
class World:
    """The rank of a process and the number of all ranks."""

    rank: int
    size: int
    local_rank: int = 0
    rendezvous: str = ""
    """URL at which the processes meet, in torch.distributed's notation. A single process needs none."""
    serves: tuple[str, int] | None = None
    """Address and port at which rank 0 holds the store; None if another rank or an agent of the launcher holds it."""
    one_machine: bool = False
    """Whether all processes are known to run on one machine."""
    hub: Any = None
    """The `Hub` that connects the threads of the backend `simulated`; None if each rank is a process."""

    @staticmethod
    def from_environment() -> "World":
        """Reads the variables that torchrun sets. Without RANK, returns a world of one rank. Raises RecipeError."""
        if "RANK" not in os.environ:
            return World(0, 1)
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise RecipeError(f"RANK is set but {', '.join(missing)} not; start with torchrun or `bagualu train`")
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        has_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return World(
            rank,
            size,
            int(os.environ.get("LOCAL_RANK", 0)),
            ENVIRONMENT,
            serves=None if rank or has_agent_store else (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])),
            one_machine=os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"],
        )


def listen_on_one_interface(world: World) -> None:
    """Restricts Gloo and NCCL in this process to the interface that leads to the other processes: on a single machine, the
    loopback.

    By default they listen at the address of the host name, which may be reachable by everyone, or wrong. On several machines, an
    interface that the user has chosen (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) is kept.
    """
    if world.rendezvous != ENVIRONMENT:
        return
    interface = None
    with suppress(OSError):  # without a route, the connection that follows reports the error
        address = LOOPBACK if world.one_machine else addresses_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))[0]
        interface = interface_of(address)
    if interface is None:
        return
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if world.one_machine:
            os.environ[name] = interface
        else:
            os.environ.setdefault(name, interface)
