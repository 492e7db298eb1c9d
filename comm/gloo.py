"""Gloo: CPU tensors over TCP. This backend runs everywhere.

reduce_scatter, all_gather and a small all_reduce that sums over two ranks are direct exchanges between all pairs of ranks rather
than Gloo's own collectives. They send as many bytes as a ring, but take a third to a half of its time over loopback
(docs/performance.md). Their sums run in rank order, so a gradient has the same bits whichever rank computes it. Between ranks of
one machine, these three collectives and all_to_all go through shared memory (shared_memory.py) if they are synchronous and not too
large, with the same sums; so do messages (shared_messages.py).
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from bagualu.comm.backend import ReduceOp, Work
from bagualu.comm.errors import CommunicationError
from bagualu.comm.pipes import Message, open_pipes
from bagualu.comm.shared_memory import SLOT_BYTES, SLOTS, Slots, share
from bagualu.comm.shared_messages import SharedMessages
from bagualu.comm.torch_transport import TorchBackend, TorchTransport, TorchWork

_MANY = 2**21
"""The largest tensor, in elements, that two ranks sum by sending each other all of it; for larger ones Gloo's all_reduce is as
fast."""
_MOST_SHARING = 16
"""The number of ranks of the largest group that tries to share memory."""
_CALLS = 0
"""The stream of the pipes that headers of collectives have; others are for messages."""
_OPS = ("lend", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "barrier")
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True)
class Exchange:
    """Messages in progress between this rank and every other rank of the group."""

    messages: tuple[TorchWork, ...]

    def wait(self) -> None:
        for message in self.messages:
            message.wait()


@dataclass
class HeaderExchange:
    """Small headers on their way to and from every other rank. `wait` raises CommunicationError unless each sent the header
    expected of it, that is, is in the same call of the same collective with a tensor of the size that this rank expects."""

    expected: dict[int, Message]
    """By position, those that this rank still waits for."""
    number: int
    op: str
    transport: "GlooTransport"

    def wait(self) -> None:
        for position, expected in list(self.expected.items()):
            received = self.transport.received_header(self.op, position, self.number)
            if received != expected:
                raise CommunicationError(f"{self.op} in {self.transport.where}: ranks have called different collectives: "
                                         f"{_describe(received)} on another, {_describe(expected)} on this one; call the same on "
                                         "all, in order")  # fmt: skip
            del self.expected[position]


def _describe(header: Message) -> str:
    op, nbytes, element_bytes, number = header
    return f"{_OPS[op]} (shared-memory call {number}) of {nbytes} bytes in elements of {element_bytes}"


@dataclass
class Summing:
    """An exchange whose `wait` writes the sum of `parts`, in rank order, to `output`. Waiting again changes nothing."""

    exchange: Work
    parts: list[torch.Tensor]
    output: torch.Tensor

    def wait(self) -> None:
        self.exchange.wait()
        parts, self.parts = self.parts, []
        _sum(parts, self.output)


@dataclass
class Receiving:
    """A message that `wait` reads from shared memory. Waiting again changes nothing."""

    tensor: torch.Tensor | None
    source: int
    number: int
    transport: "GlooTransport"

    def wait(self) -> None:
        if self.tensor is not None:
            self.transport.fill(self.tensor, self.source, self.number)
            self.tensor = None


_DONE = Exchange(())


def _sum(parts: list[torch.Tensor], output: torch.Tensor) -> None:
    """Writes the sum of `parts` to `output`, added in order in at least float32 and rounded once. If `parts` is empty, `output` is
    unchanged."""
    with torch.no_grad():
        if len(parts) == 2:
            torch.add(*parts, out=output)  # computes in float32 and rounds once, without wider copies of the parts
        elif parts:
            total = torch.add(*(part.to(_WIDER.get(part.dtype, part.dtype)) for part in parts[:2]))
            for part in parts[2:]:
                total.add_(part)
            output.copy_(total)


class GlooTransport(TorchTransport):
    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int], name: str, timeout: timedelta) -> None:
        super().__init__(group, ranks, name, timeout)
        memories = share(SLOTS * SLOT_BYTES, self._gather) if 1 < len(ranks) <= _MOST_SHARING else None
        seconds = timeout.total_seconds()
        self._pipes = open_pipes(self.position, len(ranks), self._gather, seconds) if memories else None
        self.slots = Slots(memories, self.position) if memories and self._pipes else None
        """Shared memory; None if the group has one rank or more than _MOST_SHARING, or if a rank cannot map the memory of
        another."""
        self._messages = SharedMessages(self._pipes) if self._pipes else None
        self._lent: dict[int, list[torch.Tensor]] = {}
        """Maps the id of each live tensor that this rank lends to the tensors that the other positions lent in the same call."""
        self._headers_sent = 0

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp, asynchronous: bool) -> Work:
        own, two = tensor.view(-1), op == "sum" and len(self.ranks) == 2
        if two and (all_inputs := self._through_memory("all_reduce", own, asynchronous)):
            _sum(all_inputs, own)
            return _DONE
        if not two or tensor.numel() > _MANY:
            return super().all_reduce(tensor, op, asynchronous)
        other = torch.empty_like(own)
        parts = [own, other] if self.position == 0 else [other, own]
        return Summing(self._exchange("all_reduce", [own, own], [other, other]), parts, own)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        parts = list(output.view(-1).chunk(len(self.ranks))) if output.numel() else []
        mine = input.view(-1)
        if all_inputs := self._through_memory("all_gather", mine, asynchronous):
            for part, contents in zip(parts, all_inputs, strict=True):
                part.copy_(contents)
            return _DONE
        if parts:
            parts[self.position].copy_(mine)
        return self._exchange("all_gather", [mine] * len(parts), parts)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        if lent := self._lent_by_all(input):
            parts = [whole.chunk(len(self.ranks))[self.position] for whole in lent]
            return Summing(self._exchange_header("reduce_scatter", input), parts, output.view(-1))
        outgoing = list(input.view(-1).chunk(len(self.ranks))) if input.numel() else []
        if all_inputs := self._through_memory("reduce_scatter", input.view(-1), asynchronous):
            _sum([whole.chunk(len(self.ranks))[self.position] for whole in all_inputs], output.view(-1))
            return _DONE
        incoming = [part if position == self.position else torch.empty_like(part) for position, part in enumerate(outgoing)]
        return Summing(self._exchange("reduce_scatter", outgoing, incoming), incoming, output.view(-1))

    @torch.no_grad()
    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int], asynchronous: bool
    ) -> Work:
        if self.slots is None or asynchronous:
            return super().all_to_all(output, input, output_splits, input_splits, asynchronous)
        outgoing, incoming, most = input.split(input_splits), output.split(output_splits), self.slots.part_bytes
        incoming[self.position].copy_(outgoing[self.position])
        self.slots.exchange_parts(
            [part if _bytes(part) <= most else part[:0] for part in outgoing],
            [part if _bytes(part) <= most else part[:0] for part in incoming],
            lambda: self._exchange_headers("all_to_all", outgoing, incoming).wait(),
        )
        others = [position for position in range(len(self.ranks)) if position != self.position]
        sent = [self._message("all_to_all", dist.isend, outgoing[to], to) for to in others if _bytes(outgoing[to]) > most]
        received = [self._message("all_to_all", dist.irecv, incoming[of], of) for of in others if _bytes(incoming[of]) > most]
        return Exchange((*sent, *received))

    def send(self, tensor: torch.Tensor, destination: int) -> Work:
        if self._messages is None or _bytes(tensor) > SLOT_BYTES:
            return super().send(tensor, destination)
        with self._naming("send", destination):
            self._messages.send(tensor, destination)
        return _DONE

    def receive(self, tensor: torch.Tensor, source: int) -> Work:
        if self._messages is None or _bytes(tensor) > SLOT_BYTES:
            return super().receive(tensor, source)
        return Receiving(tensor, source, self._messages.ask_for(source), self)

    def barrier(self) -> Work:
        if self.slots is None:
            return super().barrier()
        nothing = [torch.empty(0)] * len(self.ranks)
        return self._exchange_headers("barrier", nothing, nothing)

    def lend(self, numel: int, dtype: torch.dtype) -> torch.Tensor | None:
        if self.slots is None:
            return None
        self._exchange_header("lend", torch.empty(numel, dtype=dtype, device="meta")).wait()
        memories = share(numel * dtype.itemsize, self._gather)
        if memories is None:
            return None
        mine, *others = (memory.view(dtype) for memory in (memories.pop(self.position), *memories))
        self._lent[id(mine)] = others
        weakref.finalize(mine, self._lent.pop, id(mine), None)
        return mine

    def close(self) -> None:
        self.slots = None
        if self._messages:
            self._messages.close()
        if self._pipes:
            self._pipes.close()
        self._lent.clear()
        super().close()

    def _through_memory(self, op: str, contents: torch.Tensor, asynchronous: bool) -> list[torch.Tensor] | None:
        """Exchanges `contents` through shared memory and returns those of every position.

        Returns None on all ranks if the exchange has to go over the network: without shared memory, with `asynchronous`, or if
        `contents` is empty or too large.
        """
        if self.slots is None or asynchronous or not 0 < _bytes(contents) <= SLOT_BYTES:
            return None
        return self.slots.exchange(contents, lambda: self._exchange_header(op, contents).wait())

    def _exchange_header(self, op: str, contents: torch.Tensor) -> HeaderExchange:
        """Exchanges headers about a call of `op` to which all ranks give `contents` of the same size."""
        alike = [contents] * len(self.ranks)
        return self._exchange_headers(op, alike, alike)

    def _exchange_headers(self, op: str, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> HeaderExchange:
        """Sends every other position i a header about this call of `op` and the size of outgoing[i], and returns the exchange to
        wait for, in which a header about incoming[i] is expected from it. A rank sends its headers once the others may read its
        contents in shared memory."""
        number, self._headers_sent = self._headers_sent, self._headers_sent + 1
        sent, expected = (
            {place: self._header(op, part, number) for place, part in enumerate(parts) if place != self.position}
            for parts in (outgoing, incoming)
        )
        assert self._pipes is not None
        for position, header in sent.items():
            with self._naming(op, position):
                self._pipes.send(position, _CALLS, number, header)
        return HeaderExchange(expected, number, op, self)

    def fill(self, tensor: torch.Tensor, source: int, number: int) -> None:
        """Fills `tensor` with a message of `source` through shared memory, once it has come."""
        assert self._messages is not None
        with self._naming("receive", source):
            self._messages.receive(tensor, source, number)

    def received_header(self, op: str, position: int, number: int) -> Message:
        """Returns the header that `position` has sent in call `number`, once it has come."""
        assert self._pipes is not None
        with self._naming(op, position):
            return self._pipes.receive(position, _CALLS, number)

    @contextmanager
    def _naming(self, op: str, position: int) -> Iterator[None]:
        """Turns an error of the pipes to `position` into a CommunicationError that names the call and the rank."""
        try:
            yield
        except ConnectionError as error:
            raise self.error(op, RuntimeError(f"rank {self.ranks[position]} {error}")) from error

    def _header(self, op: str, contents: torch.Tensor, number: int) -> Message:
        return _OPS.index(op), _bytes(contents), contents.itemsize, number

    def _lent_by_all(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Returns the tensors that all positions lent in the same call as `tensor`; None if `tensor` is not lent."""
        others = self._lent.get(id(tensor))
        return None if others is None else [*others[: self.position], tensor, *others[self.position :]]

    def _gather(self, row: torch.Tensor) -> torch.Tensor:
        rows = row.expand(len(self.ranks), -1).clone()
        self._exchange("share memory", [row] * len(rows), list(rows)).wait()
        return rows

    def _exchange(self, op: str, outgoing: list[torch.Tensor], incoming: list[torch.Tensor]) -> Exchange:
        """Starts to send outgoing[i] to every other position i and to receive incoming[i] from it; returns the exchange to wait
        for. It does not touch this rank's own incoming[self.position], which the caller fills.

        Each rank starts with the position after its own rather than with position 0, which spreads the load.
        """
        size, own, messages = len(outgoing), self.position, []
        for distance in range(1, size):
            to, source = (own + distance) % size, (own - distance) % size
            messages.append(self._message(op, dist.isend, outgoing[to], to))
            messages.append(self._message(op, dist.irecv, incoming[source], source))
        return Exchange(tuple(messages))


class GlooBackend(TorchBackend):
    torch_name = "gloo"
    device = torch.device("cpu")
    transport_class = GlooTransport


def _bytes(tensor: torch.Tensor) -> int:
    """Returns the size of a tensor in bytes. torch's compiler cannot trace `nbytes` of a tensor whose sizes it treats as
    variable."""
    return tensor.numel() * tensor.itemsize
