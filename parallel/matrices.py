"""Brings matrices together of which several ranks hold parts, each on one rank, and takes what becomes of them back to all parts.

A matrix is the last two dims of a tensor: a tensor [E, A, B] is E matrices. Each is assigned to one of the ranks that hold a part
of it, so that these have about equal work.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch

from bagualu.comm.group import Group
from bagualu.comm.objects import gather_json
from bagualu.parallel.boxes import Box, TensorPiece, cover_problem
from bagualu.parallel.move_state import PairwiseCopy

_BATCH = 2**22
"""The number of elements of the matrices that are computed with in one call, unless a single matrix has more."""

Shape = tuple[int, int]
Matrix = tuple[str, tuple[int, ...]]
"""The name of a tensor, and the matrix's index on all dims but the last two."""
InPiece = tuple[int, tuple[int, ...]]
"""A part of a matrix: the index of the rank's piece, and the index on all dims of the piece's tensor but the last two."""
InMatrix = tuple[Shape, int, Box]
"""A part of a matrix that is assigned to this rank: the matrix's shape, its number among those of this shape, and the box."""
T = TypeVar("T", Matrix, str)


@dataclass(frozen=True)
class _Part:
    """What a rank holds of a matrix."""

    position: int
    """The rank's position in the group."""
    piece: int
    """Index of the piece, among the rank's pieces, that contains the part."""
    index: tuple[int, ...]
    """The part's index on all dims of the piece's tensor but the last two."""
    box: Box
    """Where the part lies in the matrix."""


class WholeMatrices:
    """A rank's part in computing with whole matrices."""

    def __init__(self, pieces: Sequence[TensorPiece], cost: Callable[[int, int], float], group: Group) -> None:
        """`pieces`: what this rank holds of the tensors; two boxes of a tensor are the same or have no element in common.
        `cost(A, B)`: the relative cost of computing with a matrix [A, B].

        Raises ValueError on every rank if the ranks do not hold all of a matrix. Collective.
        """
        self._group = group
        rows = [(piece.name, piece.global_shape, piece.box.offset, piece.box.shape) for piece in pieces]
        shapes, parts = _matrices(gather_json(rows, group))
        holders = {matrix: {part.position for part in own} for matrix, own in parts.items()}
        assigned = assign(holders, {matrix: cost(*shape) for matrix, shape in shapes.items()})
        self._counts: dict[Shape, int] = {}
        """The number of matrices of each shape that are assigned to this rank."""
        self._sent: list[list[InPiece]] = [[] for _ in group.ranks]
        """For each position, the parts whose values this rank sends it."""
        self._received: list[list[InMatrix]] = [[] for _ in group.ranks]
        """For each position, the parts whose values it sends this rank."""
        self._updated: list[list[InPiece]] = [[] for _ in group.ranks]
        """For each position, the parts whose new values it sends this rank."""
        self._returned: list[list[InMatrix]] = [[] for _ in group.ranks]
        """For each position, the parts whose new values this rank sends it."""
        for matrix in sorted(parts):
            if group.rank in holders[matrix]:
                self._route(assigned[matrix], shapes[matrix], parts[matrix])
            if problem := cover_problem(shapes[matrix], list({part.box for part in parts[matrix]})):
                raise ValueError(f"the ranks do not hold matrix {list(matrix[1])} of {matrix[0]}: {problem}")

    def _route(self, assigned: int, shape: Shape, parts: Sequence[_Part]) -> None:
        """Adds the messages of a matrix of `shape` that position `assigned` computes with. Of several copies of a part, that
        position gets its own, or else that of the first position after its own."""
        here, size, number = self._group.rank, self._group.size, self._counts.get(shape, 0)
        seen: set[Box] = set()
        for part in sorted(parts, key=lambda part: ((part.position - assigned) % size, part.piece)):
            copy, at = part.box in seen, (shape, number, part.box)
            seen.add(part.box)
            if part.position == here:
                self._sent[assigned] += [] if copy else [(part.piece, part.index)]
                self._updated[assigned].append((part.piece, part.index))
            if assigned == here:
                self._received[part.position] += [] if copy else [at]
                self._returned[part.position].append(at)
        if assigned == here:
            self._counts[shape] = number + 1

    def replace(self, pieces: Sequence[TensorPiece], function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
        """Replaces every matrix by what `function` makes of it: matrices [n, A, B] in `dtype` -> [n, A, B]. `pieces` are those of
        the constructor with the values of now. All copies of a part become the same bits. Collective among the ranks that share
        matrices."""
        device = self._group.device
        wholes = {shape: torch.empty(count, *shape, dtype=dtype, device=device) for shape, count in self._counts.items()}

        def in_pieces(parts: list[list[InPiece]]) -> list[list[torch.Tensor]]:
            return [[pieces[piece].tensor[index] for piece, index in own] for own in parts]

        def in_wholes(parts: list[list[InMatrix]]) -> list[list[torch.Tensor]]:
            return [[wholes[shape][number][box.slices((0, 0))] for shape, number, box in own] for own in parts]

        PairwiseCopy(in_pieces(self._sent), in_wholes(self._received), self._group, dtype).run()
        for (rows, columns), matrices in wholes.items():
            for batch in matrices.split(max(1, _BATCH // (rows * columns))):
                batch.copy_(function(batch))
        PairwiseCopy(in_wholes(self._returned), in_pieces(self._updated), self._group, dtype).run()


def assign(holders: Mapping[T, Collection[int]], costs: Mapping[T, float]) -> dict[T, int]:
    """Returns to which of its holders each matrix is assigned. Those with one holder come first, then the most expensive first,
    each to the holder with the least work so far. Equal arguments give equal results on every rank."""
    work: dict[int, float] = defaultdict(float)
    assigned = {}
    for matrix in sorted(holders, key=lambda matrix: (len(holders[matrix]) > 1, -costs[matrix], matrix)):
        assigned[matrix] = min(holders[matrix], key=lambda position: (work[position], position))
        work[assigned[matrix]] += costs[matrix]
    return assigned


_Row = tuple[str, list[int], list[int], list[int]]
"""A piece: the tensor's name and shape, offset and shape of the box."""


def _matrices(tables: Sequence[Sequence[_Row]]) -> tuple[dict[Matrix, Shape], dict[Matrix, list[_Part]]]:
    """Returns the shape and the parts of every matrix, given the pieces of each position."""
    shapes: dict[Matrix, Shape] = {}
    parts: dict[Matrix, list[_Part]] = defaultdict(list)
    for position, rows in enumerate(tables):
        for piece, (name, shape, offset, extent) in enumerate(rows):
            box = Box(tuple(offset[-2:]), tuple(extent[-2:]))
            for index in product(*(range(size) for size in extent[:-2])):
                matrix = name, tuple(start + i for start, i in zip(offset, index, strict=False))
                shapes[matrix] = (shape[-2], shape[-1])
                parts[matrix].append(_Part(position, piece, index, box))
    return shapes, parts
