"""Gloo: CPU tensors over TCP; the backend that runs everywhere.

reduce_scatter, all_gather and the sum of two members are direct exchanges instead of Gloo's own: the bytes on the wire are those
of a ring, but over loopback they take a third to a half of the time (docs/performance.md), and sums run in rank order, so that a
gradient is the same to the bit whichever member computes it.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from bagualu.comm.backend import ReduceOp, Work
from bagualu.comm.torch_transport import TorchBackend, TorchTransport, TorchWork

_MANY = 2**21
"""Elements above which two members are no longer quicker by sending each other everything."""
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True)
class Exchange:
    """Messages under way to and from every other member."""

    messages: tuple[TorchWork, ...]

    def wait(self) -> None:
        for message in self.messages:
            message.wait()


@dataclass
class ExchangeAndSum:
    """An exchange whose result is the sum of `parts`, in rank order; once summed there are none left."""

    exchange: Exchange
    parts: list[torch.Tensor]
    output: torch.Tensor

    def wait(self) -> None:
        self.exchange.wait()
        if not self.parts:
            return
        total = self.parts[0].to(_WIDER.get(self.output.dtype, self.output.dtype))
        for index, part in enumerate(self.parts[1:]):
            total = total + part if index == 0 else total.add_(part)
        self.output.copy_(total)
        self.parts = []


class GlooTransport(TorchTransport):
    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> Work:
        if op != "sum" or len(self.ranks) != 2 or tensor.numel() > _MANY:
            return super().all_reduce(tensor, op)
        own, other = tensor.view(-1), tensor.new_empty(tensor.numel())
        parts = [own, other] if self.position == 0 else [other, own]
        return ExchangeAndSum(self._exchange("all_reduce", [own, own], [other, other]), parts, own)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor) -> Exchange:
        parts = list(output.view(-1).chunk(len(self.ranks))) if output.numel() else []
        mine = input.view(-1)
        if parts:
            parts[self.position].copy_(mine)
        return self._exchange("all_gather", [mine] * len(parts), parts)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor) -> ExchangeAndSum:
        outgoing = list(input.view(-1).chunk(len(self.ranks))) if input.numel() else []
        incoming = [torch.empty_like(part) for part in outgoing]
        if outgoing:
            incoming[self.position] = outgoing[self.position]
        return ExchangeAndSum(self._exchange("reduce_scatter", outgoing, incoming), incoming, output.view(-1))

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
