"""Cuts tensors into boxes small enough to be converted one after the other."""

from collections.abc import Iterator
from math import prod

from bagualu.parallel.boxes import Box

ELEMENTS = 2**22
"""The most elements of a box."""


def portions(shape: tuple[int, ...], most: int = ELEMENTS) -> Iterator[Box]:
    """Yields boxes of at most `most` elements that make up a tensor of `shape`, in row-major order: whole rows, or parts of a row
    if that is larger."""
    if not shape:
        yield Box((), ())
        return
    row = prod(shape[1:])
    if row <= most or len(shape) == 1:
        rows = max(1, most // max(1, row))
        for begin in range(0, shape[0], rows):
            yield Box((begin, *(0 for _ in shape[1:])), (min(rows, shape[0] - begin), *shape[1:]))
        return
    for index in range(shape[0]):
        for inner in portions(shape[1:], most):
            yield Box((index, *inner.offset), (1, *inner.shape))
