"""`Group`: a sequence of ranks and the collectives between them, the same on every backend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch.distributed import ProcessGroup

from bagualu.comm.backend import Backend, ReduceOp, Transport, Work, backend_class
from bagualu.comm.errors import RecipeError
from bagualu.comm.monitor import Line, Monitor
from bagualu.comm.torch_transport import TorchTransport, process_group_of_one
from bagualu.comm.world import World

_HOST = torch.device("cpu")


class Done:
    """A `Work` that has already finished, because the call needed no communication."""

    def wait(self) -> None:
        return None


@dataclass
class _Watched:
    """A communication in progress that reports to the monitor when a caller waits for it: operation `number` of
    monitor.lines[line]."""

    work: Work
    what: str
    line: int
    number: int
    monitor: Monitor

    def wait(self) -> None:
        self.monitor.waits(self.what, self.line, self.number)
        self.work.wait()
        self.monitor.goes_on()


@dataclass(frozen=True)
class Group:
    """A fixed sequence of ranks. A position is an index into `ranks`; `rank` is this process's own position.

    Collectives and messages return `Work`. It has finished already unless `asynchronous` is true; in a collective, this flag must
    be the same on every rank of the group. Tensors must be on `device` and contiguous, and those of a call must have the same
    dtype; ValueError if they are not contiguous or differ in dtype. In a group of a single rank, collectives communicate nothing,
    and send and receive raise ValueError.
    """

    name: str
    ranks: Sequence[int]
    rank: int
    transport: Transport | None
    device: torch.device = _HOST
    """The device on which all communicated tensors must be."""
    monitor: Monitor = field(default_factory=Monitor, compare=False, repr=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def process_group(self) -> ProcessGroup:
        """torch.distributed's process group of these ranks, for a library that communicates by itself. The monitor does not see its
        communications. Raises RecipeError if the backend does not use torch.distributed."""
        if self.transport is None:
            return self._alone
        if not isinstance(self.transport, TorchTransport):
            raise RecipeError(f"comm.backend uses {type(self.transport).__name__}, not torch.distributed, which this "
                              "parallel.engine needs; give parallel.engine=native")  # fmt: skip
        return self.transport.group

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum", asynchronous: bool = False) -> Work:
        """Replaces tensor by its elementwise sum, or with op="max" its maximum, over all ranks of the group."""
        self._check(tensor)
        if (transport := self.transport) is None:
            return Done()
        return self._join("all_reduce", lambda: transport.all_reduce(tensor, op, asynchronous), asynchronous)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool = False) -> Work:
        """Fills output [size * n, ...] with the inputs [n, ...] of all positions, concatenated in order. Raises ValueError if sizes
        do not fit."""
        self._check(output, input)
        if output.numel() != input.numel() * self.size:
            raise ValueError(f"all_gather in group {self.name}: output must hold {self.size} x {tuple(input.shape)}, "
                             f"not {tuple(output.shape)}")  # fmt: skip
        if (transport := self.transport) is None:
            output.view(-1).copy_(input.view(-1))
            return Done()
        return self._join("all_gather", lambda: transport.all_gather(output, input, asynchronous), asynchronous)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool = False) -> Work:
        """Fills output [n, ...] with this position's slice of the sum of all inputs [size * n, ...]. Raises ValueError if sizes do
        not fit."""
        self._check(output, input)
        if input.numel() != output.numel() * self.size:
            raise ValueError(f"reduce_scatter in group {self.name}: input must hold {self.size} x {tuple(output.shape)}, "
                             f"not {tuple(input.shape)}")  # fmt: skip
        if (transport := self.transport) is None:
            output.view(-1).copy_(input.view(-1))
            return Done()
        return self._join("reduce_scatter", lambda: transport.reduce_scatter(output, input, asynchronous), asynchronous)

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: list[int] | None = None,
        input_splits: list[int] | None = None,
        asynchronous: bool = False,
    ) -> Work:
        """Sends input_splits[i] rows of dim 0 to position i and receives output_splits[i] rows from it. Default: equal splits.
        Raises ValueError if the splits do not add up to the rows."""
        self._check(output, input)
        output_splits = self._splits(output, output_splits)
        input_splits = self._splits(input, input_splits)
        if output.shape[1:] != input.shape[1:]:
            raise ValueError(f"all_to_all in group {self.name}: rows {tuple(input.shape[1:])} cannot become "
                             f"{tuple(output.shape[1:])}")  # fmt: skip
        if (transport := self.transport) is None:
            output.copy_(input)
            return Done()

        def start() -> Work:
            return transport.all_to_all(output, input, output_splits, input_splits, asynchronous)

        return self._join("all_to_all", start, asynchronous)

    def broadcast(self, tensor: torch.Tensor, source: int = 0, asynchronous: bool = False) -> Work:
        """Replaces tensor by the tensor of position `source`."""
        self._check(tensor)
        if (transport := self.transport) is None:
            return Done()
        position = self._position(source)
        return self._join("broadcast", lambda: transport.broadcast(tensor, position), asynchronous)

    def send(self, tensor: torch.Tensor, destination: int, asynchronous: bool = False) -> Work:
        """Sends tensor to position `destination`. Messages between two ranks arrive in the order sent."""
        self._check(tensor)
        transport = self._peer(destination)
        line = Line(self.name, (self.ranks[self.rank], self.ranks[destination]), messages=True)
        return self._join("send", lambda: transport.send(tensor, destination), asynchronous, line)

    def receive(self, tensor: torch.Tensor, source: int, asynchronous: bool = False) -> Work:
        """Fills tensor with the next message from position `source`."""
        self._check(tensor)
        transport = self._peer(source)
        line = Line(self.name, (self.ranks[source], self.ranks[self.rank]), messages=True)
        return self._join("receive", lambda: transport.receive(tensor, source), asynchronous, line)

    def read(self, tensor: torch.Tensor) -> list[Any]:
        """Returns the values of `tensor` as Python numbers, in lists nested as deep as the tensor. Waits for the accelerator.

        During a step, every value that is copied from the device to the host is read here: sums, token counts, rows per expert.
        """
        # Without values, as in a trace, all numbers are 0: of the flags that ranks send each other, none is set.
        values: list[Any] = (torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor).tolist()
        return values

    def barrier(self) -> None:
        """Waits until every rank of the group has called this method."""
        if (transport := self.transport) is not None:
            self._join("barrier", transport.barrier, asynchronous=False)

    def lend(self, numel: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Makes a tensor of zeros [numel] that `reduce_scatter` sums without copying: the other ranks read it in place.

        All ranks of the group call this together; it returns None on all of them if their memory cannot be shared or an ordinary
        tensor is as fast. Only the whole tensor is read in place, not a view. After a reduce_scatter, write to the tensor only once
        every rank has waited for that reduce_scatter, e.g. after a barrier; it is not enough that this rank has waited.
        """
        if (transport := self.transport) is None:
            return None
        self.monitor.waits("lend", self._collectives, self.monitor.joins(self._collectives))
        lent = transport.lend(numel, dtype)
        self.monitor.goes_on()
        return lent

    def _join(self, what: str, start: Callable[[], Work], asynchronous: bool, messages: Line | None = None) -> Work:
        line = self._collectives if messages is None else self.monitor.line(messages)
        number = self.monitor.joins(line)
        if asynchronous:
            return _Watched(start(), what, line, number, self.monitor)
        self.monitor.waits(what, line, number)  # before start(), which may block too
        work = start()
        work.wait()
        self.monitor.goes_on()
        return work

    @cached_property
    def _alone(self) -> ProcessGroup:
        return process_group_of_one(self.device)

    @cached_property
    def _collectives(self) -> int:
        """The index of this group's collectives in `monitor.lines`."""
        return self.monitor.line(Line(self.name, self.ranks))

    def _peer(self, position: int) -> Transport:
        if self.transport is None or self._position(position) == self.rank:
            raise ValueError(f"group {self.name}: position {position} is this rank itself; give the position of another rank")
        return self.transport

    def _position(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise ValueError(f"group {self.name} has positions 0 to {self.size - 1}, not {position}")
        return position

    def _check(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            if not tensor.is_contiguous():
                raise ValueError(f"group {self.name}: a tensor {tuple(tensor.shape)} is not contiguous; call .contiguous() first")
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise ValueError(f"group {self.name}: output and input differ in dtype: {[t.dtype for t in tensors]}")

    def _splits(self, tensor: torch.Tensor, splits: list[int] | None) -> list[int]:
        rows = tensor.shape[0]
        if splits is None:
            splits = [rows // self.size] * self.size
        if len(splits) != self.size or sum(splits) != rows or min(splits) < 0:
            raise ValueError(f"all_to_all in group {self.name}: splits {splits} must be {self.size} counts that add up to the "
                             f"{rows} rows of {tuple(tensor.shape)} ({prod(tensor.shape)} elements)")  # fmt: skip
        return splits


class Communicator:
    """One rank's connection to all other ranks; `group` makes the rank's groups. Call `close` after use."""

    def __init__(self, backend: Backend, world: World, monitor: Monitor | None = None) -> None:
        self.backend = backend
        self.rank = world.rank
        self.size = world.size
        self.device = backend.device
        self.monitor = monitor or Monitor()
        self.one_process = world.hub is not None
        """Whether all ranks are threads of this process."""
        self._hub = world.hub
        self.world = self.group(range(world.size), "world")

    def group(self, ranks: Sequence[int], name: str) -> Group:
        """Returns a new group of `ranks`, global ranks that include this rank. All of these ranks call this method, and make the
        groups that they have in common in the same order."""
        position = ranks.index(self.rank)
        if len(ranks) == 1:
            return Group(name, ranks, position, None, self.device, self.monitor)
        line = self.monitor.line(Line(name, ranks))
        self.monitor.waits("connect", line, self.monitor.joins(line))
        transport = self.backend.transport(ranks, name)
        self.monitor.goes_on()
        return Group(name, ranks, position, transport, self.device, self.monitor)

    def given_up(self) -> bool:
        """Returns whether a communication between ranks that are threads of this process has failed. All their later communications
        then fail too.

        Always False if each rank is a process.
        """
        return self._hub is not None and self._hub.failed

    def close(self) -> None:
        self.backend.close()


def connect(backend: str, world: World, timeout_seconds: float = 600.0, monitor: Monitor | None = None) -> Communicator:
    """Connects this process to the other processes of `world` through the named backend and returns the connection. Groups report
    their communications to `monitor`.

    Raises RecipeError if the backend is unknown or cannot run on this machine, CommunicationError if a rank cannot be reached.
    """
    return Communicator(backend_class(backend)(world, timeout_seconds), world, monitor)
