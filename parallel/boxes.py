"""Boxes, contiguous on every dim: the parts of a global tensor that a rank holds.

A `Box` is an offset and a shape. Flat shards (ZeRO) hold ranges of a flattened tensor; `flat_range_to_boxes` converts a range to
boxes. So a checkpoint contains boxes only, and every layout can read what any other layout has written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Box:
    """The elements with index offset[d] to offset[d] + shape[d] - 1 on every dim d."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def stop(self) -> tuple[int, ...]:
        """The index after the last element, on every dim."""
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))

    def shift(self, by: tuple[int, ...]) -> "Box":
        """Returns the box in the coordinates of a larger tensor, in which the present tensor begins at `by`."""
        return Box(tuple(o + b for o, b in zip(self.offset, by, strict=True)), self.shape)

    def inside(self, shape: tuple[int, ...]) -> bool:
        """Returns whether the box lies within a tensor of `shape`."""
        return len(self.offset) == len(self.shape) == len(shape) and all(
            o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(self.offset, self.shape, shape, strict=True)
        )

    def intersection(self, other: "Box") -> "Box | None":
        """Returns the elements that both boxes contain; None if there are none."""
        start = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        shape = tuple(min(a, b) - s for a, b, s in zip(self.stop, other.stop, start, strict=True))
        return Box(start, shape) if all(n > 0 for n in shape) else None

    def within(self, shape: tuple[int, ...]) -> "Box | None":
        """Returns the part of the box that lies within a tensor of `shape`; None if there is none."""
        return self.intersection(Box((0,) * len(shape), tuple(shape)))

    def slices(self, origin: tuple[int, ...]) -> tuple[slice, ...]:
        """Returns the index of this box into a tensor whose first element has the global index `origin`."""
        return tuple(slice(o - b, o - b + s) for o, b, s in zip(self.offset, origin, self.shape, strict=True))


@dataclass(frozen=True)
class TensorPiece:
    """A box of the global tensor `name`, which has shape `global_shape`. The box begins at `offset` and has the shape of `tensor`,
    which holds its values or is the memory to fill with them."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: "Tensor"

    @property
    def box(self) -> Box:
        return Box(tuple(self.offset), tuple(self.tensor.shape))

    @property
    def dtype(self) -> str:
        """The name of the dtype, e.g. float32."""
        return str(self.tensor.dtype).removeprefix("torch.")


def flat_range_to_boxes(shape: Sequence[int], start: int, stop: int) -> list[tuple[int, Box]]:
    """Converts elements [start, stop) of the flattened (row-major) tensor of `shape` to the fewest boxes.

    Returns a list of (flat start, box) in flat order; a box holds the flat elements from its flat start to flat start +
    box.elements - 1. In two dims there are at most three boxes: a part of the first row, whole rows, and a part of the last row. In
    more dims each partial row is divided in the same way. Raises ValueError for a range that does not lie in the tensor.
    """
    shape = tuple(shape)
    if not 0 <= start <= stop <= prod(shape):
        raise ValueError(f"range {start} to {stop} does not lie in the {prod(shape)} elements of a tensor {shape}")
    if start == stop:
        return []
    if start == 0 and stop == prod(shape):
        return [(0, Box((0,) * len(shape), shape))]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows are first .. last
    if first > last:  # the range begins and ends within the same row
        return _in_row(shape, last, start, stop)
    boxes = _in_row(shape, first - 1, start, first * row)
    if first < last:
        boxes.append((first * row, Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))))
    return boxes + _in_row(shape, last, last * row, stop)


def cover_problem(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """Returns the reason why `boxes` do not hold every element of a tensor of `shape` exactly once; None if they do."""
    for box in boxes:
        if not box.inside(shape):
            return f"the box at {box.offset} of shape {box.shape} does not lie in {shape}"
    boxes = [box for box in boxes if box.elements]
    pair = _overlap(boxes)
    if pair:
        first, second = pair
        return f"the boxes at {first.offset} of shape {first.shape} and at {second.offset} of shape {second.shape} overlap"
    held = sum(box.elements for box in boxes)
    return None if held == prod(shape) else f"only {held} of {prod(shape)} elements are held"


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[tuple[int, Box]]:
    """Returns the boxes of [start, stop), a range within `row` of dim 0."""
    begin = row * prod(shape[1:])
    inner = flat_range_to_boxes(shape[1:], start - begin, stop - begin)
    return [(begin + flat, Box((row, *box.offset), (1, *box.shape))) for flat, box in inner]


def _overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Returns two boxes that share elements; None if no boxes do.

    Boxes are sorted by their start on the dim that has the most different starts, so that each box can overlap only the few boxes
    that begin before it ends. In one array operation all boxes are compared with their next neighbour, then with the
    second next, and so on.
    """
    if len(boxes) < 2:
        return None
    if not boxes[0].offset:
        return boxes[0], boxes[1]
    starts = np.array([box.offset for box in boxes], np.int64)  # [boxes, dims]
    dim = max(range(starts.shape[1]), key=lambda d: len(np.unique(starts[:, d])))
    order = np.argsort(starts[:, dim], kind="stable")
    starts = starts[order]
    stops = starts + np.array([box.shape for box in boxes], np.int64)[order]
    neighbours = np.searchsorted(starts[:, dim], stops[:, dim]) - np.arange(len(boxes))
    for distance in range(1, int(neighbours.max())):
        first = np.flatnonzero(neighbours > distance)
        second = first + distance
        overlaps = ((starts[first] < stops[second]) & (starts[second] < stops[first])).all(axis=1)
        if overlaps.any():
            pair = int(overlaps.argmax())
            return boxes[order[first[pair]]], boxes[order[second[pair]]]
    return None
