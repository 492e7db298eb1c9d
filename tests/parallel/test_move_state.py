"""Boxes moved between ranks: whatever was held however, everybody ends with the values of the global tensors."""

import random
from itertools import pairwise

import pytest
import torch

from bagualu.comm.group import Communicator
from bagualu.parallel.boxes import Box, TensorPiece, flat_range_to_boxes
from bagualu.parallel.move_state import Relocation, table
from tests.harness import BACKENDS, run

SHAPES = {"a": (7, 5), "b": (13,), "c": (3, 4, 2), "scalar": (1,)}


def whole(name: str) -> torch.Tensor:
    size = torch.Size(SHAPES[name]).numel()
    return (torch.arange(size, dtype=torch.float64) + 1000 * len(name) + ord(name[0])).view(SHAPES[name])


def cut(draw: random.Random, ranks: int, copies: bool) -> list[list[tuple[str, Box]]]:
    """Boxes by rank that hold every element once; with `copies` some ranks hold some of them as well."""
    by_rank: list[list[tuple[str, Box]]] = [[] for _ in range(ranks)]
    for name, shape in SHAPES.items():
        size = torch.Size(shape).numel()
        edges = sorted({0, size, *(draw.randint(0, size) for _ in range(draw.randint(0, 4)))})
        for start, stop in pairwise(edges):
            holders = draw.sample(range(ranks), draw.randint(1, ranks) if copies else 1)
            for rank in holders:
                by_rank[rank] += [(name, box) for _, box in flat_range_to_boxes(shape, start, stop)]
    return by_rank


def move(communicator: Communicator, seed: int) -> int:
    draw = random.Random(seed)
    before, after = cut(draw, communicator.size, copies=False), cut(draw, communicator.size, copies=True)
    here = communicator.rank
    held = [
        TensorPiece(name, SHAPES[name], box.offset, whole(name)[box.slices((0,) * len(box.shape))].clone())
        for name, box in before[here]
    ]
    wanted = [
        TensorPiece(name, SHAPES[name], box.offset, torch.full(box.shape, -1.0, dtype=torch.float64)) for name, box in after[here]
    ]

    def empty(boxes: list[tuple[str, Box]]) -> list[TensorPiece]:
        return [TensorPiece(name, SHAPES[name], box.offset, torch.empty(box.shape)) for name, box in boxes]

    tables = [table(empty(h), empty(w)) for h, w in zip(before, after, strict=True)]
    Relocation(held, wanted, tables, communicator.world).run()
    messages = [line.ranks for line in communicator.monitor.lines if line.messages]
    assert messages == sorted(messages, key=lambda ends: (min(ends), max(ends), ends)), "a rank could wait forever over NCCL"
    for part in wanted:
        assert torch.equal(part.tensor, whole(part.name)[part.box.slices((0,) * len(part.box.shape))]), part
    return len(wanted)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_everybody_gets_what_it_wants(ranks: int) -> None:
    for seed in range(20):
        run("simulated", ranks, move, seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_over_every_backend(backend: str) -> None:
    received = run(backend, 4, move, 3)
    assert any(received)


def lacking(communicator: Communicator) -> None:
    held = [TensorPiece("b", (13,), (0,), torch.zeros(3))]
    wanted = [TensorPiece("b", (13,), (0,), torch.zeros(4))]
    with pytest.raises(ValueError, match="this rank needs a part of b that no rank holds"):
        Relocation(held, wanted, [table(held, wanted)], communicator.world)


def test_what_nobody_holds_is_named() -> None:
    run("simulated", 1, lacking)
