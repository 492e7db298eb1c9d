"""Matrices of which several ranks hold parts: each is computed with whole, on one rank, and all parts get the result."""

import random
from itertools import pairwise
from math import prod

import pytest
import torch

from bagualu.comm.group import Communicator
from bagualu.parallel import matrices
from bagualu.parallel.boxes import Box, TensorPiece, flat_range_to_boxes
from bagualu.parallel.matrices import WholeMatrices, assign
from tests.harness import BACKENDS, run

SHAPES = {"a": (7, 5), "b": (5, 7), "c": (3, 4, 2), "d": (4, 7, 5), "e": (1, 6)}
"""Tensors of 1 + 1 + 3 + 4 + 1 matrices."""


def whole(name: str) -> torch.Tensor:
    return torch.randn(SHAPES[name], dtype=torch.float64, generator=torch.Generator().manual_seed(ord(name)))


def changed(matrix: torch.Tensor) -> torch.Tensor:
    """Depends on all elements, and on where each is."""
    return matrix * matrix.abs().sum() + torch.arange(matrix.numel()).view(matrix.shape)


def cut(draw: random.Random, ranks: int) -> list[list[tuple[str, Box]]]:
    """Boxes by rank that hold every element, many of them several times."""
    by_rank: list[list[tuple[str, Box]]] = [[] for _ in range(ranks)]
    for name, shape in SHAPES.items():
        edges = sorted({0, prod(shape), *(draw.randint(0, prod(shape)) for _ in range(draw.randint(0, 5)))})
        for start, stop in pairwise(edges):
            for rank in draw.sample(range(ranks), draw.randint(1, ranks)):
                by_rank[rank] += [(name, box) for _, box in flat_range_to_boxes(shape, start, stop)]
    return by_rank


def held_by(communicator: Communicator, seed: int) -> list[TensorPiece]:
    boxes = cut(random.Random(seed), communicator.size)[communicator.rank]
    return [TensorPiece(name, SHAPES[name], box.offset, whole(name)[box.slices((0,) * len(box.shape))]) for name, box in boxes]


def replaced(communicator: Communicator, seed: int) -> int:
    computed: list[int] = []

    def function(batch: torch.Tensor) -> torch.Tensor:
        computed.append(len(batch))
        assert len(batch) == 1 or batch.numel() <= matrices._BATCH
        return torch.stack([changed(matrix) for matrix in batch])

    pieces = held_by(communicator, seed)
    together = WholeMatrices(pieces, lambda rows, columns: rows * columns, communicator.world)
    for _ in range(2):
        for piece in pieces:
            piece.tensor.copy_(whole(piece.name)[piece.box.slices((0,) * len(piece.offset))])
        together.replace(pieces, function, torch.float64)
        for piece in pieces:
            tensor = whole(piece.name)
            expected = torch.stack([changed(matrix) for matrix in tensor]) if tensor.dim() == 3 else changed(tensor)
            assert torch.equal(piece.tensor, expected[piece.box.slices((0,) * len(piece.offset))]), piece
    return sum(computed) // 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_matrix_is_computed_with_once_and_reaches_all_its_parts(ranks: int) -> None:
    for seed in range(12):
        assert sum(run("simulated", ranks, replaced, seed)) == 10


def test_over_processes() -> None:
    assert sum(run("gloo", 4, replaced, 3)) == 10


def test_many_matrices_are_computed_with_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "_BATCH", 70)  # two of d, and all of the others
    assert sum(run("simulated", 2, replaced, 3)) == 10


def as_16_bit(communicator: Communicator) -> list[torch.Tensor]:
    """Rank 0 holds the upper half, the others copies of the lower half."""
    rows = slice(0, 3) if communicator.rank == 0 else slice(3, 7)
    piece = TensorPiece("a", (7, 5), (rows.start, 0), whole("a").float()[rows].clone())
    together = WholeMatrices([piece], lambda rows, columns: 1.0, communicator.world)
    seen: list[torch.Tensor] = []

    def function(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch.clone())
        return batch

    together.replace([piece], function, torch.bfloat16)
    assert torch.equal(piece.tensor, whole("a").float()[rows].bfloat16().float())
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_travel_and_are_computed_with_in_the_given_dtype(backend: str) -> None:
    (seen,) = [batches for batches in run(backend, 3, as_16_bit) if batches]
    assert torch.equal(seen[0][0], whole("a").float().bfloat16())


def copies(communicator: Communicator) -> list[int]:
    """Every rank holds all; returns how many messages this rank has sent or received."""
    pieces = [TensorPiece(name, SHAPES[name], (0,) * len(SHAPES[name]), whole(name)) for name in ("a", "b", "c")]
    WholeMatrices(pieces, lambda rows, columns: 1.0, communicator.world).replace(pieces, lambda batch: 2 * batch, torch.float64)
    assert all(torch.equal(piece.tensor, 2 * whole(piece.name)) for piece in pieces)
    monitor = communicator.monitor
    return [count for line, count in zip(monitor.lines, monitor.counts, strict=False) if line.messages]


def test_a_rank_that_holds_a_copy_is_sent_no_other() -> None:
    """The only messages are the results."""
    assert run("simulated", 2, copies) == [[1, 1], [1, 1]]


def lacking(communicator: Communicator) -> None:
    piece = TensorPiece("a", (7, 5), (communicator.rank, 0), torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"the ranks do not hold matrix \[\] of a: only 10 of 35 elements are held"):
        WholeMatrices([piece], lambda rows, columns: 1.0, communicator.world)


def test_a_matrix_that_the_ranks_do_not_hold_is_named_on_all_of_them() -> None:
    run("simulated", 2, lacking)


def test_work_that_only_one_rank_can_do_is_counted_first() -> None:
    holders = {"big": [0, 1], "one": [0], "two": [0], "small": [0, 1]}
    assert assign(holders, {"big": 4.0, "one": 3.0, "two": 3.0, "small": 1.0}) == {"big": 1, "one": 0, "two": 0, "small": 1}


def test_the_most_expensive_is_assigned_first() -> None:
    costs = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 3.0}
    assigned = assign({matrix: [0, 1] for matrix in costs}, costs)
    assert sum(costs[matrix] for matrix, position in assigned.items() if position == 0) == 3
