"""The parts shared by all backends on torch.distributed: `gloo`, `nccl` and those of other vendors.

A vendor's backend (hccl, xccl, ...) subclasses `TorchBackend`, sets its `torch_name` and `device`, and registers under the entry
point group `bagualu.backends`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from bagualu.comm.attempt import join
from bagualu.comm.backend import ReduceOp, Work
from bagualu.comm.errors import CommunicationError, RecipeError
from bagualu.comm.store import HashStore, store_of
from bagualu.comm.world import World, listen_on_one_interface

# torch 2.13 renamed these functions and deprecated the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass
class TorchWork:
    """A torch work handle. Its errors name the call, its tensors stay alive until `wait` has returned, and a second `wait` returns
    at once."""

    work: dist.Work | None
    op: str
    transport: "TorchTransport"
    tensors: tuple[torch.Tensor, ...]

    def wait(self) -> None:
        if self.work is None:
            return
        try:
            self.work.wait()
        except RuntimeError as error:
            raise self.transport.error(self.op, error) from error
        self.work, self.tensors = None, ()  # a second wait for the same Gloo message would never return


class TorchTransport:
    """The collectives of one torch process group. No call blocks."""

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int], name: str, timeout: timedelta) -> None:
        """`timeout`: that of `group`."""
        self.group = group
        self.ranks = ranks
        self.name = name
        self.timeout = timeout
        self.position = ranks.index(dist.get_rank())

    @property
    def where(self) -> str:
        """Names the group in an error."""
        return f"group {self.name} of ranks {list(self.ranks)}"

    def error(self, op: str, error: RuntimeError) -> CommunicationError:
        """Returns a CommunicationError that names the call, the group and the first line of torch's `error`."""
        return CommunicationError(f"{op} in {self.where} failed: {_first_line(error)}")

    def _start(self, op: str, call: Callable[[], dist.Work | None], *tensors: torch.Tensor) -> TorchWork:
        try:
            return TorchWork(call(), op, self, tensors)
        except RuntimeError as error:
            raise self.error(op, error) from error

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp, asynchronous: bool) -> Work:
        return self._start("all_reduce", lambda: dist.all_reduce(tensor, _OPS[op], self.group, async_op=True), tensor)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        flat, part = output.view(-1), input.view(-1)
        return self._start("all_gather", lambda: _all_gather(flat, part, self.group, async_op=True), flat, part)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        part, flat = output.view(-1), input.view(-1)
        return self._start(
            "reduce_scatter",
            lambda: _reduce_scatter(part, flat, group=self.group, async_op=True),
            part,
            flat,
        )

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int], asynchronous: bool
    ) -> Work:
        return self._start(
            "all_to_all",
            lambda: dist.all_to_all_single(output, input, output_splits, input_splits, self.group, async_op=True),
            output,
            input,
        )

    def broadcast(self, tensor: torch.Tensor, source: int) -> TorchWork:
        rank = self.ranks[source]
        return self._start("broadcast", lambda: dist.broadcast(tensor, rank, self.group, async_op=True), tensor)

    def send(self, tensor: torch.Tensor, destination: int) -> Work:
        return self._message(f"send to rank {self.ranks[destination]}", dist.isend, tensor, destination)

    def receive(self, tensor: torch.Tensor, source: int) -> Work:
        return self._message(f"receive from rank {self.ranks[source]}", dist.irecv, tensor, source)

    def _message(self, op: str, start: Callable[..., dist.Work | None], tensor: torch.Tensor, position: int) -> TorchWork:
        return self._start(op, lambda: start(tensor, self.ranks[position], self.group), tensor)

    def barrier(self) -> Work:
        return self._start("barrier", lambda: dist.barrier(self.group, async_op=True))

    def lend(self, numel: int, dtype: torch.dtype) -> torch.Tensor | None:
        return None

    def close(self) -> None:
        """Drops the process group, which ends its threads. The hooks of a model may keep this object alive in cycles that Python's
        garbage collector cannot see."""
        del self.group


class TorchBackend:
    """A rank's connection through torch's default process group, which this class creates and destroys. A world of a single rank
    without a rendezvous has none."""

    torch_name: str
    device: torch.device
    transport_class: type[TorchTransport] = TorchTransport

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self.world = world
        self.timeout = timedelta(seconds=timeout_seconds)
        self._transports: list[TorchTransport] = []
        if world.size > 1 or world.rendezvous:
            listen_on_one_interface(world)
            try:
                store = join(store_of(world, self.timeout), world, self.torch_name, timeout_seconds)
                dist.init_process_group(
                    self.torch_name,
                    store=store,
                    rank=world.rank,
                    world_size=world.size,
                    timeout=self.timeout,
                )
            except RecipeError:
                raise
            except (RuntimeError, ValueError, OSError) as error:
                raise CommunicationError(
                    f"rank {world.rank} could not join {world.size} ranks at {world.rendezvous}: {_first_line(error)}"
                ) from error

    def transport(self, ranks: Sequence[int], name: str) -> TorchTransport:
        # Only members take part in making a group, so a rank's cost grows with its own groups, not with all groups of the world.
        group = dist.new_group(list(ranks), timeout=self.timeout, backend=self.torch_name, use_local_synchronization=True)
        self._transports.append(self.transport_class(group, ranks, name, self.timeout))
        return self._transports[-1]

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        for transport in self._transports:
            transport.close()
        self._transports.clear()


def process_group_of_one(device: torch.device) -> dist.ProcessGroup:
    """Returns a new process group of this rank alone. Starts torch.distributed if a world of one rank has done without it so far;
    `TorchBackend.close` ends it."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1)
    group: dist.ProcessGroup = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return group


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
