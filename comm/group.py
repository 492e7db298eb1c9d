"""`Group`: a set of ranks and its collectives, the same on every backend."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch

from bagualu.comm.backend import Backend, ReduceOp, Transport, Work, backend_class
from bagualu.comm.monitor import Line, Monitor
from bagualu.comm.world import World

_HOST = torch.device("cpu")


class Done:
    """The work of a communication that needed none."""

    def wait(self) -> None:
        return None


@dataclass
class _Watched:
    """A communication under way whose waiting is seen: operation `number` of the monitor's line at `line`."""

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
    """Some ranks in a fixed order. Positions count places in the group; `rank` is this process's own position.

    Collectives return `Work`; unless `asynchronous`, the same on every member, it is already done. Tensors must be contiguous
    and on the backend's device. A group of one communicates nothing.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    transport: Transport | None
    device: torch.device = _HOST
    """Where the tensors of its collectives live."""
    monitor: Monitor = field(default_factory=Monitor, compare=False, repr=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum", asynchronous: bool = False) -> Work:
        """In place: the sum (or the maximum) over all members."""
        self._check(tensor)
        if (transport := self.transport) is None:
            return Done()
        return self._join("all_reduce", lambda: transport.all_reduce(tensor, op, asynchronous), asynchronous)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool = False) -> Work:
        """output [size * n, ...]: the members' inputs [n, ...] one after the other."""
        self._check(output, input)
        if output.numel() != input.numel() * self.size:
            raise ValueError(f"all_gather in group {self.name}: output must hold {self.size} x {tuple(input.shape)}, "
                             f"not {tuple(output.shape)}")  # fmt: skip
        if (transport := self.transport) is None:
            output.view(-1).copy_(input.view(-1))
            return Done()
        return self._join("all_gather", lambda: transport.all_gather(output, input, asynchronous), asynchronous)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool = False) -> Work:
        """output [n, ...]: this member's slice of the sum of the inputs [size * n, ...]."""
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
        """Rows of dim 0: input_splits[i] of them go to position i, output_splits[i] come from it; even when left out."""
        self._check(output, input)
        output_splits = self._splits(output, output_splits)
        input_splits = self._splits(input, input_splits)
        if output.shape[1:] != input.shape[1:]:
            raise ValueError(f"all_to_all in group {self.name}: rows {tuple(input.shape[1:])} cannot become "
                             f"{tuple(output.shape[1:])}")  # fmt: skip
        if (transport := self.transport) is None:
            output.copy_(input)
            return Done()
        return self._join("all_to_all", lambda: transport.all_to_all(output, input, output_splits, input_splits), asynchronous)

    def broadcast(self, tensor: torch.Tensor, source: int = 0, asynchronous: bool = False) -> Work:
        """In place: every member gets what position `source` holds."""
        self._check(tensor)
        if (transport := self.transport) is None:
            return Done()
        position = self._position(source)
        return self._join("broadcast", lambda: transport.broadcast(tensor, position), asynchronous)

    def send(self, tensor: torch.Tensor, destination: int, asynchronous: bool = False) -> Work:
        """To position `destination`. Messages of one pair and direction arrive in order."""
        self._check(tensor)
        transport = self._peer(destination)
        line = Line(self.name, (self.ranks[self.rank], self.ranks[destination]), messages=True)
        return self._join("send", lambda: transport.send(tensor, destination), asynchronous, line)

    def receive(self, tensor: torch.Tensor, source: int, asynchronous: bool = False) -> Work:
        """In place, from position `source`."""
        self._check(tensor)
        transport = self._peer(source)
        line = Line(self.name, (self.ranks[source], self.ranks[self.rank]), messages=True)
        return self._join("receive", lambda: transport.receive(tensor, source), asynchronous, line)

    def barrier(self) -> None:
        """Return when every member has come here."""
        if (transport := self.transport) is not None:
            self._join("barrier", transport.barrier, asynchronous=False)

    def lend(self, numel: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Zeros [numel], called by all members alike, that the others read where they lie when they are given to `reduce_scatter`
        whole; None where a tensor of one's own serves as well. What has been given may be written again when all members have
        waited for it (a barrier says so); not, as usual, when this one has."""
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
        self.monitor.waits(what, line, number)  # before the start, which may have to wait too
        work = start()
        work.wait()
        self.monitor.goes_on()
        return work

    @cached_property
    def _collectives(self) -> int:
        """Where the monitor counts them."""
        return self.monitor.line(Line(self.name, self.ranks))

    def _peer(self, position: int) -> Transport:
        if self.transport is None or self._position(position) == self.rank:
            raise ValueError(f"group {self.name}: position {position} is this rank itself; there is nobody to talk to")
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
    """One rank's way to all groups. Close it when done."""

    def __init__(self, backend: Backend, world: World, monitor: Monitor | None = None) -> None:
        self.backend = backend
        self.rank = world.rank
        self.size = world.size
        self.device = backend.device
        self.monitor = monitor or Monitor()
        self.one_process = world.hub is not None
        """Whether all ranks are threads of this process."""
        self._hub = world.hub
        self.world = self.group(tuple(range(world.size)), "world")

    def group(self, ranks: tuple[int, ...], name: str) -> Group:
        """The group of `ranks` (this rank among them). All of them call this, in the same order."""
        position = ranks.index(self.rank)
        if len(ranks) == 1:
            return Group(name, ranks, position, None, self.device, self.monitor)
        line = self.monitor.line(Line(name, ranks))
        self.monitor.waits("connect", line, self.monitor.joins(line))
        transport = self.backend.transport(ranks, name)
        self.monitor.goes_on()
        return Group(name, ranks, position, transport, self.device, self.monitor)

    def given_up(self) -> bool:
        """Whether the other ranks, threads of this process, have given up waiting for this one."""
        return self._hub is not None and self._hub.failed

    def close(self) -> None:
        self.backend.close()


def connect(backend: str, world: World, timeout_seconds: float = 600.0, monitor: Monitor | None = None) -> Communicator:
    """Join the world with the named backend, watched by `monitor`.

    Raises RecipeError for a backend that is unknown or that this machine cannot run.
    """
    return Communicator(backend_class(backend)(world, timeout_seconds), world, monitor)
