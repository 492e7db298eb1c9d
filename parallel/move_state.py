"""Moves boxes of global tensors from the memory of the ranks that hold them to the ranks that want them.

Checkpoints contain the same boxes, so every change of layout that works through a checkpoint also works without one.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch

from bagualu.comm.group import Group
from bagualu.parallel.boxes import Box, TensorPiece

Table = dict[str, list[Any]]
"""The boxes that a rank holds and wants, without values: {"held": [...], "wanted": [...]}, with (tensor name, offset, shape) for
each."""


def table(held: Sequence[TensorPiece], wanted: Sequence[TensorPiece]) -> Table:
    """Returns the boxes that this rank holds and wants as plain JSON, to be sent to the other ranks."""
    return {
        "held": [(piece.name, piece.box.offset, piece.box.shape) for piece in held],
        "wanted": [(piece.name, piece.box.offset, piece.box.shape) for piece in wanted],
    }


class Relocation:
    """A rank's part in a move between the ranks of a group."""

    def __init__(self, held: Sequence[TensorPiece], wanted: Sequence[TensorPiece], tables: Sequence[Table], group: Group) -> None:
        """`tables[i]` is the table of position i, and the tables contain no element twice among those held. Pieces of the
        same name have the same dtype on all ranks.

        Raises ValueError if no rank holds an element that this rank wants.
        """
        holders = [_by_name(entry["held"]) for entry in tables]
        seekers = [_boxes(entry["wanted"]) for entry in tables]
        own = group.rank
        outgoing = [[_view(held[index], common) for _, index, common in _intersections(seeker, holders[own])] for seeker in seekers]
        incoming = [
            [_view(wanted[index], common) for index, _, common in _intersections(seekers[own], holder)] for holder in holders
        ]
        missing = _first_missing(seekers[own], holders)
        if missing is not None:
            raise ValueError(f"this rank needs a part of {missing} that no rank holds")
        self._copy = PairwiseCopy(outgoing, incoming, group)

    def run(self) -> None:
        """Copies all values to the tensors that want them. Collective. It allocates no memory but what the
        transport may need for messages."""
        self._copy.run()


class PairwiseCopy:
    """A rank's part in copying tensors between the ranks of a group, with the buffers for its messages."""

    def __init__(
        self,
        outgoing: Sequence[list[torch.Tensor]],
        incoming: Sequence[list[torch.Tensor]],
        group: Group,
        dtype: torch.dtype | None = None,
    ) -> None:
        """outgoing[i] are copied to the tensors of the same shapes that position i has as incoming[this rank's position].

        They travel in `dtype`, by default one that holds the values of all tensors of a message; then its tensors have the same
        dtypes on both sides.
        """
        self._group, self._outgoing, self._incoming = group, outgoing, incoming
        self._send_buffers, self._receive_buffers = (
            [_buffer(tensors, group.device, dtype) if i != group.rank else None for i, tensors in enumerate(both)]
            for both in (outgoing, incoming)
        )

    def run(self) -> None:
        """Copies the tensors. Collective among the ranks that have tensors for each other. It allocates no memory but
        what the transport may need for messages.

        Each pair of ranks exchanges at most one message in each direction; all ranks go through the pairs in the same order.
        """
        own, group, works = self._group.rank, self._group, []
        for target, held in zip(self._incoming[own], self._outgoing[own], strict=True):
            target.copy_(held)
        for other in range(group.size):
            for source in sorted((own, other)):  # the pair's message from the lower position comes first
                outgoing = self._send_buffers[other] if source == own else None
                incoming = self._receive_buffers[other] if source == other else None
                if outgoing is not None:
                    tensors = self._outgoing[other]
                    for part, tensor in zip(_split(outgoing, tensors), tensors, strict=True):
                        part.copy_(tensor)
                    works.append(group.send(outgoing, other, asynchronous=True))
                elif incoming is not None:
                    works.append(group.receive(incoming, other, asynchronous=True))
        for work in works:
            work.wait()
        for buffer, targets in zip(self._receive_buffers, self._incoming, strict=True):
            if buffer is not None:
                for part, target in zip(_split(buffer, targets), targets, strict=True):
                    target.copy_(part)


def _buffer(tensors: list[torch.Tensor], device: torch.device, dtype: torch.dtype | None) -> torch.Tensor | None:
    """Returns a flat tensor with room for all `tensors`, by default in a dtype that holds the values of each; None if there are
    none."""
    if not tensors:
        return None
    dtype = dtype or reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return torch.empty(sum(tensor.numel() for tensor in tensors), dtype=dtype, device=device)


def _split(buffer: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns views of `buffer`, one after the other, in the shapes of `tensors`."""
    parts = buffer.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


Boxes = list[tuple[str, Box]]
ByName = dict[str, list[tuple[int, Box]]]
"""For each tensor name, its boxes as (index in the rank's list of all boxes, box)."""


def _boxes(rows: list[Any]) -> Boxes:
    return [(name, Box(tuple(offset), tuple(shape))) for name, offset, shape in rows]


def _by_name(rows: list[Any]) -> ByName:
    boxes: ByName = {}
    for index, (name, box) in enumerate(_boxes(rows)):
        boxes.setdefault(name, []).append((index, box))
    return boxes


def _intersections(wanted: Boxes, held: ByName) -> Iterator[tuple[int, int, Box]]:
    """Yields (index into wanted, index into held, common box), in the same order on the sending and the receiving rank."""
    for wanted_index, (name, box) in enumerate(wanted):
        for held_index, other in held.get(name, ()):
            if common := box.intersection(other):
                yield wanted_index, held_index, common


def _view(piece: TensorPiece, common: Box) -> torch.Tensor:
    return piece.tensor[common.slices(piece.offset)]


def _first_missing(wanted: Boxes, holders: Sequence[ByName]) -> str | None:
    for name, box in wanted:
        intersections = [box.intersection(other) for held in holders for _, other in held.get(name, ())]
        if sum(common.elements for common in intersections if common) < box.elements:
            return name
    return None
