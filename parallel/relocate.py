"""Boxes of global tensors on their way from the ranks that hold them to those that want them, from memory to memory.

The same boxes as in a checkpoint, so whatever a checkpoint can reshard can be moved without one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bagualu.comm.group import Group
from bagualu.parallel.boxes import Box

Table = dict[str, list[Any]]
"""What a rank holds and wants, without the values."""


@dataclass(frozen=True)
class Part:
    """A box of the global tensor `name`, and its values or the place for them."""

    name: str
    box: Box
    tensor: torch.Tensor


def table(held: Sequence[Part], wanted: Sequence[Part]) -> Table:
    """For the other ranks to see; JSON."""
    return {
        "held": [(part.name, part.box.offset, part.box.shape) for part in held],
        "wanted": [(part.name, part.box.offset, part.box.shape) for part in wanted],
    }


class Relocation:
    """One rank's part of a move among the members of a group."""

    def __init__(self, held: Sequence[Part], wanted: Sequence[Part], tables: Sequence[Table], group: Group) -> None:
        """`tables`: every member's, by position; no two members hold the same element.

        Raises ValueError when something that this rank wants is held by nobody.
        """
        self._group = group
        holders = [_by_name(one["held"]) for one in tables]
        seekers = [_boxes(one["wanted"]) for one in tables]
        here = group.rank
        self._outgoing = [
            [_view(held[place], common) for _, place, common in _meetings(seeker, holders[here])] for seeker in seekers
        ]
        self._incoming = [
            [_view(wanted[place], common) for place, _, common in _meetings(seekers[here], holder)] for holder in holders
        ]
        missing = _first_missing(seekers[here], holders)
        if missing is not None:
            raise ValueError(f"a part of {missing} is held by no rank")
        self._leaving = [_room(tensors, group.device) if there != here else None for there, tensors in enumerate(self._outgoing)]
        self._arriving = [_room(tensors, group.device) if there != here else None for there, tensors in enumerate(self._incoming)]

    def run(self) -> None:
        """Move everything; all memory it takes is there already. Collective. One message each way between two members; pairs take
        turns in one order on all of them."""
        here, group, works = self._group.rank, self._group, []
        for target, held in zip(self._incoming[here], self._outgoing[here], strict=True):
            target.copy_(held)
        for low in range(group.size):
            for high in range(low + 1, group.size):
                for source, destination in ((low, high), (high, low)):
                    leaving = self._leaving[destination] if source == here else None
                    arriving = self._arriving[source] if destination == here else None
                    if leaving is not None:
                        tensors = self._outgoing[destination]
                        for room, tensor in zip(_cut(leaving, tensors), tensors, strict=True):
                            room.copy_(tensor)
                        works.append(group.send(leaving, destination, asynchronous=True))
                    elif arriving is not None:
                        works.append(group.receive(arriving, source, asynchronous=True))
        for work in works:
            work.wait()
        for arrived, targets in zip(self._arriving, self._incoming, strict=True):
            if arrived is not None:
                for part, target in zip(_cut(arrived, targets), targets, strict=True):
                    target.copy_(part)


def _room(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """For all of them, one after the other; None where there are none."""
    elements = sum(tensor.numel() for tensor in tensors)
    return torch.empty(elements, dtype=tensors[0].dtype, device=device) if tensors else None


def _cut(room: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The places in `room`, in the shapes of `tensors`."""
    parts = room.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


Boxes = list[tuple[str, Box]]
ByName = dict[str, list[tuple[int, Box]]]
"""(place in the list, box) of every box of a tensor."""


def _boxes(rows: list[Any]) -> Boxes:
    return [(name, Box(tuple(offset), tuple(shape))) for name, offset, shape in rows]


def _by_name(rows: list[Any]) -> ByName:
    found: ByName = {}
    for place, (name, box) in enumerate(_boxes(rows)):
        found.setdefault(name, []).append((place, box))
    return found


def _meetings(wanted: Boxes, held: ByName) -> Iterator[tuple[int, int, Box]]:
    """(place in what is wanted, place in what is held, the common box), in an order that both sides see alike."""
    for place, (name, box) in enumerate(wanted):
        for there, other in held.get(name, ()):
            if common := box.intersection(other):
                yield place, there, common


def _view(part: Part, common: Box) -> torch.Tensor:
    return part.tensor[common.slices(part.box.offset)]


def _first_missing(wanted: Boxes, holders: Sequence[ByName]) -> str | None:
    for name, box in wanted:
        common = [box.intersection(other) for held in holders for _, other in held.get(name, ())]
        if sum(one.elements for one in common if one) < box.elements:
            return name
    return None
