"""The parts of the model's parameters that a rank updates under DeepSpeed, and where they lie in DeepSpeed's flat tensors.

ZeRO-1 and 2 lay the parameters of a group one after the other in a flat tensor, of which each rank has an equal part. ZeRO-3
divides every parameter among the ranks; a rank's parts of a group's parameters lie one after the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bagualu.comm.group import Group
from bagualu.fault_tolerance.guard.engine import StateShard
from bagualu.parallel.data.bucket import BucketKind, Entry

Members = dict[BucketKind, list[Entry]]
"""Parameters by their properties. Those of a kind are a group of DeepSpeed's; their entries lie one after the other."""


@dataclass
class ZeroPart:
    """What this rank updates of a group of parameters, a `Shard` of the optimizer; under ZeRO-3 also its part of a frozen one."""

    name: str
    """Description for messages, e.g. "layers.3.down.weight and 4 more"."""
    kind: BucketKind
    group: Group
    """The ranks among which DeepSpeed divides the parameters."""
    entries: list[tuple[Entry, int, int, int]]
    """(entry, first element in the part, first element in the flattened parameter, number of elements) of every parameter that has
    elements in the part."""
    shard_weights: torch.Tensor
    """DeepSpeed's own master weights [n], in float32; of a frozen parameter the working weights."""
    shard_gradients: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """The reduced gradients [n] while the part is being updated, otherwise empty."""

    @property
    def treatment(self) -> object:
        return self.kind.treatment

    @property
    def owned(self) -> bool:
        return self.kind.counted

    def shard_entries(self) -> Iterator[tuple[Entry, int, int, int]]:
        return iter(self.entries)

    def state(self, tensors: dict[str, torch.Tensor], copies: Sequence[torch.Tensor]) -> StateShard:
        """Returns what the guard reads of the part; `tensors` is its state. `copies` as in StateShard."""
        along = [axis for axis in (self.kind.copied_over, "ends" if self.kind.tied else None) if axis]
        return StateShard(self.name, tensors, self.kind.reduction_axis, self.group, along, copies)


def flat_part(kind: BucketKind, group: Group, entries: Sequence[Entry], weights: torch.Tensor) -> ZeroPart:
    """Returns this rank's part under ZeRO-1 and 2, whose master weights are `weights`."""
    begin, held = weights.numel() * group.rank, []
    for entry in entries:
        low, high = max(begin, entry.start), min(begin + weights.numel(), entry.start + entry.parameter.numel())
        if low < high:
            held.append((entry, low - begin, low - entry.start, high - low))
    return ZeroPart(_name(entries), kind, group, held, weights)


def sharded_part(kind: BucketKind, group: Group, entries: Sequence[Entry], weights: torch.Tensor) -> ZeroPart:
    """Returns this rank's part under ZeRO-3, which `weights` holds. Sets its elements beyond the end of a parameter to 0."""
    held, start = [], 0
    for entry in entries:
        parameter: Any = entry.parameter
        size = parameter.partition_numel()
        first = size * group.rank
        count = max(0, min(size, parameter.ds_numel - first))
        weights[start + count : start + size].zero_()
        if count:
            held.append((entry, start, first, count))
        start += size
    require_layout(start == weights.numel())
    return ZeroPart(_name(entries), kind, group, held, weights)


def _name(entries: Sequence[Entry]) -> str:
    return entries[0].name + (f" and {len(entries) - 1} more" if len(entries) > 1 else "")


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns a flat view of `tensors`, which lie one after the other in memory. Raises RuntimeError if they do not."""
    end = tensors[0].data_ptr()
    for tensor in tensors:
        require_layout(tensor.data_ptr() == end and tensor.is_contiguous())
        end += tensor.nbytes
    return tensors[0].detach().as_strided((sum(tensor.numel() for tensor in tensors),), (1,))


def require_layout(as_expected: bool) -> None:
    """Raises RuntimeError unless DeepSpeed's tensors lie `as_expected`."""
    if not as_expected:
        raise RuntimeError("DeepSpeed has laid out its tensors in another way than this version of Bagualu knows")
