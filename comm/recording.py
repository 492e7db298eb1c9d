"""Writes down the communication of a rank: around another backend, or alone, where nothing is sent.

Alone it needs no other rank: one process stands for any rank of a world of any size. Tensors are then on the meta device, which
knows their shapes but holds no values, and `Group.read` gives zeros.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bagualu.comm.backend import Backend, ReduceOp, Transport, Work
from bagualu.comm.calls import Communication, Pending, Waited
from bagualu.comm.world import World

Write = Callable[[Communication | Waited, Sequence[torch.Tensor]], None]
"""Called with each event and, for a call, its tensors."""


@dataclass(eq=False)
class RecordedWork:
    """A communication that was written down; `work` is None if none is carried out."""

    work: Work | None
    call: Communication
    write: Write
    pending: "Pending[RecordedWork]"
    """The communications of this rank for which it has not waited."""
    waited: bool = False

    def __post_init__(self) -> None:
        self.pending.begin(self.call, self)

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        if not self.waited:
            self.waited = True
            self.write(self.pending.waited(self.call, self), ())


class RecordingTransport:
    """The `Transport` of a group that writes its calls down, and passes them to `inner`, if there is one."""

    def __init__(
        self, inner: Transport | None, ranks: Sequence[int], name: str, write: Write, pending: Pending[RecordedWork]
    ) -> None:  # fmt: skip
        self.inner, self.ranks, self.name, self.write, self._pending = inner, ranks, name, write, pending

    def _record(
        self, kind: str, size_bytes: int, call: Callable[[Transport], Work], *tensors: torch.Tensor, peer: int | None = None
    ) -> RecordedWork:
        begun = Communication(kind, self.name, len(self.ranks), size_bytes, peer)
        self.write(begun, tensors)
        return RecordedWork(call(self.inner) if self.inner is not None else None, begun, self.write, self._pending)

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp, asynchronous: bool) -> Work:
        return self._record("all_reduce", tensor.nbytes, lambda inner: inner.all_reduce(tensor, op, asynchronous), tensor)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        return self._record("all_gather", output.nbytes, lambda inner: inner.all_gather(output, input, asynchronous), output, input)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        return self._record(
            "reduce_scatter", input.nbytes, lambda inner: inner.reduce_scatter(output, input, asynchronous), output, input
        )

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int], asynchronous: bool
    ) -> Work:
        return self._record(
            "all_to_all",
            max(output.nbytes, input.nbytes),
            lambda inner: inner.all_to_all(output, input, output_splits, input_splits, asynchronous),
            output,
            input,
        )

    def broadcast(self, tensor: torch.Tensor, source: int) -> Work:
        return self._record("broadcast", tensor.nbytes, lambda inner: inner.broadcast(tensor, source), tensor, peer=source)

    def send(self, tensor: torch.Tensor, destination: int) -> Work:
        return self._record("send", tensor.nbytes, lambda inner: inner.send(tensor, destination), tensor, peer=destination)

    def receive(self, tensor: torch.Tensor, source: int) -> Work:
        return self._record("receive", tensor.nbytes, lambda inner: inner.receive(tensor, source), tensor, peer=source)

    def barrier(self) -> Work:
        return self._record("barrier", 0, lambda inner: inner.barrier())

    def lend(self, numel: int, dtype: torch.dtype) -> torch.Tensor | None:
        self.write(Communication("lend", self.name, len(self.ranks), numel * dtype.itemsize), ())
        return self.inner.lend(numel, dtype) if self.inner is not None else None


class RecordingBackend:
    """The `Backend` whose transports write down what they do, with `write`. Without an `inner` backend nothing is sent."""

    def __init__(
        self, world: World, timeout_seconds: float, inner: Backend | None = None, write: Write = lambda event, tensors: None
    ) -> None:  # fmt: skip
        self.world, self.inner, self.write = world, inner, write
        self._pending = Pending[RecordedWork]()
        self.device = inner.device if inner is not None else torch.device("meta")

    def transport(self, ranks: Sequence[int], name: str) -> RecordingTransport:
        inner = self.inner.transport(ranks, name) if self.inner is not None else None
        return RecordingTransport(inner, ranks, name, self.write, self._pending)

    def close(self) -> None:
        if self.inner is not None:
            self.inner.close()
