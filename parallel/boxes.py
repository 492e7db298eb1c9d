"""Axis-aligned boxes of tensors: what part of a global tensor somebody holds. Free of torch.

A `Box` is an offset and a shape. Flat shards (ZeRO) hold ranges of a flattened tensor; `flat_range_to_boxes` says which
boxes of the tensor those are, so that a checkpoint knows only boxes and any layout can read what any other wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np


@dataclass(frozen=True)
class Box:
    """Elements offset[d] .. offset[d] + shape[d] of every dim d."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def stop(self) -> tuple[int, ...]:
        """One past the last index on every dim."""
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))

    def shift(self, by: tuple[int, ...]) -> "Box":
        """The same box seen from further out: `by` is where the tensor it lies in starts in the larger one."""
        return Box(tuple(o + b for o, b in zip(self.offset, by, strict=True)), self.shape)

    def inside(self, shape: tuple[int, ...]) -> bool:
        """Whether it lies within a tensor of `shape`."""
        return len(self.offset) == len(self.shape) == len(shape) and all(
            o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(self.offset, self.shape, shape, strict=True)
        )

    def intersection(self, other: "Box") -> "Box | None":
        """The elements in both; None when there are none."""
        start = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        shape = tuple(min(a, b) - s for a, b, s in zip(self.stop, other.stop, start, strict=True))
        return Box(start, shape) if all(n > 0 for n in shape) else None

    def slices(self, origin: tuple[int, ...]) -> tuple[slice, ...]:
        """Index of this box in a tensor whose first element lies at `origin`."""
        return tuple(slice(o - b, o - b + s) for o, b, s in zip(self.offset, origin, self.shape, strict=True))


def flat_range_to_boxes(shape: Sequence[int], start: int, stop: int) -> list[tuple[int, Box]]:
    """Elements [start, stop) of the row-major flattened tensor of `shape`, as the fewest boxes contiguous in it.

    Returns (flat start, box) in flat order: the elements of a box are flat start .. flat start + box.elements. In two
    dims that is at most a part of the first row, whole rows and a part of the last row; in more dims those parts fall
    apart in the same way. Raises ValueError for a range that does not lie in the tensor.
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
    if first > last:  # the range begins and ends within one row
        return _in_row(shape, last, start, stop)
    boxes = _in_row(shape, first - 1, start, first * row)
    if first < last:
        boxes.append((first * row, Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))))
    return boxes + _in_row(shape, last, last * row, stop)


def cover_problem(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """Why `boxes` do not hold every element of a tensor of `shape` exactly once; None when they do."""
    for box in boxes:
        if not box.inside(shape):
            return f"the box at {box.offset} of shape {box.shape} does not lie in {shape}"
    boxes = [box for box in boxes if box.elements]
    pair = _overlap(boxes)
    if pair:
        one, other = pair
        return f"the boxes at {one.offset} of shape {one.shape} and at {other.offset} of shape {other.shape} overlap"
    held = sum(box.elements for box in boxes)
    return None if held == prod(shape) else f"only {held} of {prod(shape)} elements are held"


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[tuple[int, Box]]:
    """The boxes of [start, stop), all of it in `row` of dim 0."""
    begin = row * prod(shape[1:])
    inner = flat_range_to_boxes(shape[1:], start - begin, stop - begin)
    return [(begin + flat, Box((row, *box.offset), (1, *box.shape))) for flat, box in inner]


def _overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share elements. Sorted along the dim that keeps most of them apart, a box can only meet the few that begin
    before it ends; all boxes are compared with their first neighbour at once, then with their second, and so on."""
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
        one = np.flatnonzero(neighbours > distance)
        other = one + distance
        meet = ((starts[one] < stops[other]) & (starts[other] < stops[one])).all(axis=1)
        if meet.any():
            first = int(meet.argmax())
            return boxes[order[one[first]]], boxes[order[other[first]]]
    return None
