"""Gloo: CPU tensors over TCP; the backend that runs everywhere.

reduce_scatter, all_gather and the sum of two members are direct exchanges instead of Gloo's own: the bytes on the wire are those
of a ring, but over loopback they take a third to a half of the time (docs/performance.md), and sums run in rank order, so that a
gradient is the same to the bit whichever member computes it. Members on one machine exchange what fits through memory that they
share (shared_memory.py), with the same sums.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from bagualu.comm.backend import ReduceOp, Work
from bagualu.comm.shared_memory import SLOT_BYTES, Slots, share
from bagualu.comm.torch_transport import TorchBackend, TorchTransport, TorchWork

_MANY = 2**21
"""Elements above which two members are no longer quicker by sending each other everything."""
LEAST_SHARED_BYTES = 2**18
"""Below this the contents themselves are as quick on the wire as word of where they lie."""
_WORD = torch.zeros(1, dtype=torch.uint8)
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True)
class Exchange:
    """Messages under way to and from every other member."""

    messages: tuple[TorchWork, ...]

    def wait(self) -> None:
        for message in self.messages:
            message.wait()


@dataclass
class Reading:
    """An exchange after which `read` makes the result from what came; once it has there is nothing left to do."""

    exchange: Exchange
    read: Callable[[], None] | None

    def wait(self) -> None:
        self.exchange.wait()
        read, self.read = self.read, None
        if read is not None:
            read()


@torch.no_grad()
def _sum(parts: list[torch.Tensor], output: torch.Tensor) -> None:
    """In rank order, in at least float32, rounded once; `parts` of nothing are none."""
    if len(parts) == 2:
        torch.add(*parts, out=output)  # which is computed so without a wider copy of either
    elif parts:
        total = torch.add(*(part.to(_WIDER.get(part.dtype, part.dtype)) for part in parts[:2]))
        for part in parts[2:]:
            total.add_(part)
        output.copy_(total)


@torch.no_grad()
def _copy(parts: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    for output, part in zip(outputs, parts, strict=True):
        output.copy_(part)


class GlooTransport(TorchTransport):
    on_one_machine = False
    """Whether all members run here."""
    slots: Slots | None = None
    _looked_for_slots = False

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> Work:
        if op != "sum" or len(self.ranks) != 2 or tensor.numel() > _MANY:
            return super().all_reduce(tensor, op)
        own = tensor.view(-1)
        if slots := self._slots_for(own):
            given = slots.put(own)
            return slots.begun(Reading(self._tell("all_reduce"), partial(_sum, given, own)))
        other = torch.empty_like(own)
        parts = [own, other] if self.position == 0 else [other, own]
        return Reading(self._exchange("all_reduce", [own, own], [other, other]), partial(_sum, parts, own))

    def all_gather(self, output: torch.Tensor, input: torch.Tensor) -> Work:
        parts = list(output.view(-1).chunk(len(self.ranks))) if output.numel() else []
        mine = input.view(-1)
        if slots := self._slots_for(mine):
            given = slots.put(mine)
            return slots.begun(Reading(self._tell("all_gather"), partial(_copy, given, parts)))
        if parts:
            parts[self.position].copy_(mine)
        return self._exchange("all_gather", [mine] * len(parts), parts)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor) -> Work:
        outgoing = list(input.view(-1).chunk(len(self.ranks))) if input.numel() else []
        if slots := self._slots_for(input.view(-1)):
            given = [whole.chunk(len(self.ranks))[self.position] for whole in slots.put(input.view(-1))]
            return slots.begun(Reading(self._tell("reduce_scatter"), partial(_sum, given, output.view(-1))))
        incoming = [torch.empty_like(part) for part in outgoing]
        if outgoing:
            incoming[self.position] = outgoing[self.position]
        return Reading(self._exchange("reduce_scatter", outgoing, incoming), partial(_sum, incoming, output.view(-1)))

    def close(self) -> None:
        self.slots = None
        super().close()

    def _slots_for(self, contents: torch.Tensor) -> Slots | None:
        """Where `contents` are exchanged through memory, the same answer on every member."""
        if not self.on_one_machine or not LEAST_SHARED_BYTES <= contents.nbytes <= SLOT_BYTES:
            return None
        if not self._looked_for_slots:
            self._looked_for_slots = True
            memories = share(self._gather_words)
            self.slots = Slots(memories, self.position) if memories else None
        return self.slots

    def _gather_words(self, words: torch.Tensor) -> torch.Tensor:
        rows = words.expand(len(self.ranks), -1).clone()
        self._exchange("all_gather", [words] * len(rows), list(rows)).wait()
        return rows

    def _tell(self, op: str) -> Exchange:
        """Tell every other member that this one has put what it gives into its slot, and hear the same from them."""
        heard = torch.empty(len(self.ranks), 1, dtype=torch.uint8)
        return self._exchange(op, [_WORD] * len(heard), list(heard))

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

    def transport(self, ranks: tuple[int, ...], name: str) -> TorchTransport:
        made = super().transport(ranks, name)
        assert isinstance(made, GlooTransport)
        made.on_one_machine = set(ranks) <= set(self.world.neighbours)
        return made
