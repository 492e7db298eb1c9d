"""Writes down the communication of a rank: around another backend, or alone, where nothing is sent.

Alone it needs no other rank: one process stands for any rank of a world of any size. Tensors are then on the meta device, which
knows their shapes but holds no values, and `Group.read` gives zeros.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bagualu.comm.backend import Backend, ReduceOp, Transport, Work
from bagualu.comm.calls import Communication, Waited
from bagualu.comm.world import World

Write = Callable[[Communication | Waited, Sequence[torch.Tensor]], None]
"""Called with each event and, for a call, its tensors."""


class Recorder:
    """Numbers the calls of a rank and passes them to `write`, in order."""

    def __init__(self, write: Write) -> None:
        self.write = write
        self._calls = 0

    def begin(
        self, kind: str, group: str, size: int, size_bytes: int, tensors: Sequence[torch.Tensor] = (), peer: int | None = None
    ) -> int:
        """Writes a call down and returns its number."""
        number, self._calls = self._calls, self._calls + 1
        self.write(Communication(number, kind, group, size, size_bytes, peer), tensors)
        return number


@dataclass
class RecordedWork:
    """A communication that was written down; `work` is None if none is carried out."""

    work: Work | None
    number: int
    recorder: Recorder
    waited: bool = False

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        if not self.waited:
            self.waited = True
            self.recorder.write(Waited(self.number), ())


class RecordingTransport:
    """The `Transport` of a group that writes its calls down, and passes them to `inner`, if there is one."""

    def __init__(self, inner: Transport | None, ranks: Sequence[int], name: str, recorder: Recorder) -> None:
        self.inner, self.ranks, self.name, self.recorder = inner, ranks, name, recorder

    def _record(
        self, kind: str, size_bytes: int, call: Callable[[Transport], Work], *tensors: torch.Tensor, peer: int | None = None
    ) -> RecordedWork:
        number = self.recorder.begin(kind, self.name, len(self.ranks), size_bytes, tensors, peer)
        return RecordedWork(call(self.inner) if self.inner is not None else None, number, self.recorder)

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp, asynchronous: bool) -> Work:
        return self._record("all_reduce", tensor.nbytes, lambda inner: inner.all_reduce(tensor, op, asynchronous), tensor)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        return self._record("all_gather", output.nbytes, lambda inner: inner.all_gather(output, input, asynchronous), output, input)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        return self._record(
            "reduce_scatter", input.nbytes, lambda inner: inner.reduce_scatter(output, input, asynchronous), output, input
        )

    def all_to_all(self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int]) -> Work:
        return self._record(
            "all_to_all",
            max(output.nbytes, input.nbytes),
            lambda inner: inner.all_to_all(output, input, output_splits, input_splits),
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
        self.recorder.begin("lend", self.name, len(self.ranks), numel * dtype.itemsize)
        return self.inner.lend(numel, dtype) if self.inner is not None else None


class RecordingBackend:
    """The `Backend` whose transports write down what they do, with `write`. Without an `inner` backend nothing is sent."""

    def __init__(
        self, world: World, timeout_seconds: float, inner: Backend | None = None, write: Write = lambda event, tensors: None
    ) -> None:  # fmt: skip
        self.world, self.inner, self.recorder = world, inner, Recorder(write)
        self.device = inner.device if inner is not None else torch.device("meta")

    def transport(self, ranks: Sequence[int], name: str) -> RecordingTransport:
        inner = self.inner.transport(ranks, name) if self.inner is not None else None
        return RecordingTransport(inner, ranks, name, self.recorder)

    def close(self) -> None:
        if self.inner is not None:
            self.inner.close()
