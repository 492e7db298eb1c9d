"""Gloo: CPU tensors over TCP; the backend that runs everywhere.

reduce_scatter, all_gather and the sum of two members are direct exchanges instead of Gloo's own: the bytes on the wire are those
of a ring, but over loopback they take a third to a half of the time (docs/performance.md), and sums run in rank order, so that a
gradient is the same to the bit whichever member computes it. What the members of one machine wait for at once goes, if it is
neither small nor large, through memory that they share (shared_memory.py), with the same sums.
"""

import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bagualu.comm.backend import ReduceOp, Work
from bagualu.comm.errors import CommunicationError
from bagualu.comm.shared_memory import SLOT_BYTES, SLOTS, Slots, share
from bagualu.comm.torch_transport import TorchBackend, TorchTransport, TorchWork

_MANY = 2**21
"""Elements above which two members are no longer quicker by sending each other everything."""
LEAST_SHARED_BYTES = 2**19
"""Below this the contents themselves are as quick on the wire as word of where they lie (tests/bench/exchange.py)."""
_MOST_SHARING = 16
"""Members; of more it is not asked whether they can see each other's memory."""
_OPS = ("lend", "all_reduce", "all_gather", "reduce_scatter")
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True)
class Exchange:
    """Messages under way to and from every other member."""

    messages: tuple[TorchWork, ...]

    def wait(self) -> None:
        for message in self.messages:
            message.wait()


@dataclass(frozen=True)
class Words:
    """One word to every other member and one from each, which must all be the same: of what call this is a part."""

    exchange: Exchange
    said: torch.Tensor
    heard: list[torch.Tensor]
    where: str

    def wait(self) -> None:
        self.exchange.wait()
        for word in self.heard:
            if not torch.equal(word, self.said):
                raise CommunicationError(f"{self.where}: a member has called {_call(word)}, this one {_call(self.said)}")


def _call(word: torch.Tensor) -> str:
    op, nbytes, item_bytes, number = word.tolist()
    return f"{_OPS[op]} of {nbytes} bytes in elements of {item_bytes}, number {number} in memory"


@dataclass
class Summing:
    """An exchange whose result is the sum of `parts`, in rank order; once summed there are none left."""

    exchange: Work
    parts: list[torch.Tensor]
    output: torch.Tensor

    def wait(self) -> None:
        self.exchange.wait()
        parts, self.parts = self.parts, []
        _sum(parts, self.output)


_DONE = Exchange(())


def _sum(parts: list[torch.Tensor], output: torch.Tensor) -> None:
    """In rank order, in at least float32, rounded once; `parts` of nothing are none."""
    with torch.no_grad():
        if len(parts) == 2:
            torch.add(*parts, out=output)  # which is computed so without a wider copy of either
        elif parts:
            total = torch.add(*(part.to(_WIDER.get(part.dtype, part.dtype)) for part in parts[:2]))
            for part in parts[2:]:
                total.add_(part)
            output.copy_(total)


class GlooTransport(TorchTransport):
    def __init__(self, group: dist.ProcessGroup, ranks: tuple[int, ...], name: str) -> None:
        super().__init__(group, ranks, name)
        memories = share(SLOTS * SLOT_BYTES, self._gather_words) if 1 < len(ranks) <= _MOST_SHARING else None
        self.slots = Slots(memories, self.position) if memories else None
        """Where all members see each other's memory."""
        self._lent: dict[int, list[torch.Tensor]] = {}
        """By the identity of a tensor that others read, as long as it lives: those of the other positions."""
        self._said = 0
        """Words to all other members."""

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp, asynchronous: bool) -> Work:
        own, two = tensor.view(-1), op == "sum" and len(self.ranks) == 2
        if two and (given := self._through_memory("all_reduce", own, asynchronous)):
            _sum(given, own)
            return _DONE
        if not two or tensor.numel() > _MANY:
            return super().all_reduce(tensor, op, asynchronous)
        other = torch.empty_like(own)
        parts = [own, other] if self.position == 0 else [other, own]
        return Summing(self._exchange("all_reduce", [own, own], [other, other]), parts, own)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        parts = list(output.view(-1).chunk(len(self.ranks))) if output.numel() else []
        mine = input.view(-1)
        if given := self._through_memory("all_gather", mine, asynchronous):
            for part, one in zip(parts, given, strict=True):
                part.copy_(one)
            return _DONE
        if parts:
            parts[self.position].copy_(mine)
        return self._exchange("all_gather", [mine] * len(parts), parts)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        if lent := self._lent_by_all(input):
            parts = [whole.chunk(len(self.ranks))[self.position] for whole in lent]
            return Summing(self._words("reduce_scatter", input), parts, output.view(-1))
        outgoing = list(input.view(-1).chunk(len(self.ranks))) if input.numel() else []
        if given := self._through_memory("reduce_scatter", input.view(-1), asynchronous):
            _sum([whole.chunk(len(self.ranks))[self.position] for whole in given], output.view(-1))
            return _DONE
        incoming = [torch.empty_like(part) for part in outgoing]
        if outgoing:
            incoming[self.position] = outgoing[self.position]
        return Summing(self._exchange("reduce_scatter", outgoing, incoming), incoming, output.view(-1))

    def lend(self, numel: int, dtype: torch.dtype) -> torch.Tensor | None:
        if self.slots is None:
            return None
        self._words("lend", torch.empty(numel, dtype=dtype, device="meta")).wait()
        memories = share(numel * dtype.itemsize, self._gather_words)
        if memories is None:
            return None
        mine, *others = (memory.view(dtype) for memory in (memories.pop(self.position), *memories))
        self._lent[id(mine)] = others
        weakref.finalize(mine, self._lent.pop, id(mine), None)
        return mine

    def close(self) -> None:
        self.slots = None
        self._lent.clear()
        super().close()

    def _through_memory(self, op: str, contents: torch.Tensor, asynchronous: bool) -> list[torch.Tensor] | None:
        """What every member gives; None on all of them where it is to go over the network."""
        if self.slots is None or asynchronous or not LEAST_SHARED_BYTES <= contents.nbytes <= SLOT_BYTES:
            return None
        return self.slots.exchange(contents, lambda: self._words(op, contents).wait())

    def _words(self, op: str, contents: torch.Tensor) -> Words:
        """Say to every other member, and hear from each, that `contents` are there to be read."""
        self._said += 1
        said = torch.tensor([_OPS.index(op), contents.nbytes, contents.itemsize, self._said])
        heard = [torch.empty_like(said) for _ in self.ranks]
        heard[self.position] = said
        where = f"{op} in group {self.name} of ranks {list(self.ranks)}"
        return Words(self._exchange(op, [said] * len(heard), heard), said, heard, where)

    def _lent_by_all(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """What every member has lent together with `tensor`, by position."""
        others = self._lent.get(id(tensor))
        return None if others is None else [*others[: self.position], tensor, *others[self.position :]]

    def _gather_words(self, words: torch.Tensor) -> torch.Tensor:
        rows = words.expand(len(self.ranks), -1).clone()
        self._exchange("share memory", [words] * len(rows), list(rows)).wait()
        return rows

    def _exchange(self, op: str, outgoing: list[torch.Tensor], incoming: list[torch.Tensor]) -> Exchange:
        """Send outgoing[i] to position i and fill incoming[i] from it, nearest positions first so that no member is flooded."""
        size, here, messages = len(outgoing), self.position, []
        for distance in range(1, size):
            to, source = (here + distance) % size, (here - distance) % size
            messages.append(self._message(op, dist.isend, outgoing[to], to))
            messages.append(self._message(op, dist.irecv, incoming[source], source))
        return Exchange(tuple(messages))


class GlooBackend(TorchBackend):
    torch_name = "gloo"
    device = torch.device("cpu")
    transport_class = GlooTransport
