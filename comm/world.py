"""This process's rank and the number of all ranks. No other file of `comm` reads the launcher's environment variables."""

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.comm.interface import LOOPBACK, addresses_towards, interface_of

ENVIRONMENT = "env://"
"""Value of `World.rendezvous` for processes that find each other through the launcher's environment variables."""


@dataclass(frozen=True)
class World:
    """The rank of a process and the number of all ranks."""

    rank: int
    size: int
    local_rank: int = 0
    rendezvous: str = ""
    """URL at which the processes meet, in torch.distributed's notation. A single process needs none."""
    serves: tuple[str, int] | None = None
    """Address and port at which this process must serve the store; None if another rank or an agent of the launcher serves the
    store, or no store is needed."""
    one_machine: bool = False
    """Whether all processes are known to run on one machine."""
    hub: Any = None
    """The `Hub` through which ranks that are threads of this process communicate (backend `simulated`); None if each rank is a
    process."""

    @staticmethod
    def from_environment() -> "World":
        """Returns the world that torchrun's variables describe, or a world of one rank if `RANK` is not set.

        Raises RecipeError if `RANK` is set but WORLD_SIZE, MASTER_ADDR or MASTER_PORT is missing.
        """
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
    """Restricts Gloo and NCCL in this process to the network interface that leads to the other processes: the loopback interface if
    all processes are known to run on one machine. Does nothing unless the rendezvous is ENVIRONMENT.

    By default they listen at the address of the host name, which may be wrong or reachable from anywhere. On several machines, an
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


@dataclass(frozen=True)
class Tasks:
    """Processes that srun or mpirun started directly. They have no torchrun ranks, so they cannot communicate."""

    launcher: str
    count: int
    nodes: int
    index: int
    """Index of this process among the `count` processes."""

    @staticmethod
    def from_environment() -> "Tasks | None":
        """Returns the tasks that a launcher such as srun started without assigning torchrun ranks.

        Returns None if `RANK` is set or only one process was started.
        """
        if "RANK" in os.environ:
            return None
        for launcher, count, index in _LAUNCHERS:
            if int(os.environ.get(count) or 1) > 1:
                nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or 1) if launcher == "srun" else 1
                return Tasks(launcher, int(os.environ[count]), nodes, int(os.environ.get(index) or 0))
        return None

    def refusal(self) -> str:
        """Returns an error message that gives a torchrun command which starts as many ranks (rounded up to the same number per
        node)."""
        ranks = -(-self.count // self.nodes)
        torchrun = f"torchrun --nproc-per-node={ranks}"
        if self.nodes > 1:
            torchrun += f" --nnodes={self.nodes} --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29400"
        command = f"{torchrun} -m bagualu.trainer ..."
        if self.launcher == "srun":
            command = f"srun --ntasks-per-node=1 {command}, or bagualu slurm launch.nodes={self.nodes} launch.workers={ranks} ..."
        return f"{self.launcher} started {self.count} processes, which know nothing of each other without torchrun; give {command}"


_LAUNCHERS = (
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
)
"""For each launcher, its name and its two environment variables: the number of processes and the index of this process."""
