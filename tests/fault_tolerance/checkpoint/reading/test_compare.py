"""Two checkpoints are the same when every bit of the state is, whatever layouts wrote them; else what differs is named."""

from pathlib import Path

import torch

from bagualu.comm import simulated
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.reading.compare import differences
from bagualu.fault_tolerance.checkpoint.saving.save import save
from bagualu.parallel.boxes import TensorPiece


def saved(root: Path, ranks: int, weight: torch.Tensor, **metadata: object) -> Path:
    """`weight` [rows, columns] cut into `ranks` pieces."""
    rows = weight.shape[0] // ranks

    def rank_main(communicator: Communicator) -> Path:
        begin = communicator.rank * rows
        piece = TensorPiece("weight/a", tuple(weight.shape), (begin, 0), weight[begin : begin + rows])
        return save(root, 4, [piece], {"step": 4, "layout": {"data": ranks}, "zero": ranks, **metadata}, communicator.world, keep=1)

    return simulated.run(ranks, rank_main)[0]


def test_another_layout_and_another_way_there_are_no_difference(tmp_path: Path) -> None:
    weight = torch.arange(24.0).view(6, 4)
    one = saved(tmp_path / "one", 2, weight, guard={"norms": [1.5], "counts": {"skipped": 0}})
    other = saved(tmp_path / "other", 3, weight, guard={"norms": [1.5], "counts": {"skipped": 2}})
    assert differences(one, other) == []


def test_one_bit_is_a_difference_even_of_zero(tmp_path: Path) -> None:
    weight = torch.zeros(2, 4)
    negative = weight.clone()
    negative[1, 3] = -0.0
    found = differences(saved(tmp_path / "one", 1, weight), saved(tmp_path / "other", 1, negative))
    assert found == ["tensor weight/a: 1 bytes differ"]


def test_metadata_shapes_and_missing_tensors_are_named(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", 1, torch.zeros(2, 4), updates=3)
    found = differences(one, saved(tmp_path / "other", 1, torch.zeros(4, 2), updates=2))
    assert found[0] == "metadata updates: 3 and 2"
    assert found[1].startswith("tensor weight/a: ((2, 4), ")


def test_of_long_metadata_the_place_is_named_and_not_the_whole(tmp_path: Path) -> None:
    losses = [float(step) for step in range(1000)]
    weight = torch.zeros(2, 4)
    one = saved(tmp_path / "one", 1, weight, guard={"losses": losses}, note="a" * 500)
    other = saved(tmp_path / "other", 1, weight, guard={"losses": [*losses[:700], 0.5, *losses[701:]]}, note="b" * 500)
    assert differences(one, other) == ["metadata guard.losses[700]: 700.0 and 0.5", f"metadata note: {'a' * 60} and {'b' * 60}"]
