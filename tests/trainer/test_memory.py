"""A run predicts its memory by kind and measures its peak, and says both."""

import json
from pathlib import Path

import pytest
import torch

from bagualu.comm.group import Communicator
from bagualu.parallel.memory_kinds import KINDS
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.memory import PeakMemory
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.run import train
from tests.harness import run
from tests.parity import small_recipe


def recipe(folder: Path, **changes: object) -> Recipe:
    sizes = {"model__hidden": 64, "model__ffn": 160, "model__vocab": 512, "data__sequence_length": 64}
    quiet = {"log__progress": "off", "checkpoint__every": 0, "train__validation_sequences": 0}
    return small_recipe(**{"run__dir": str(folder), "train__steps": 3, **quiet, **sizes, **changes})


def memory_of(communicator: Communicator, recipe: Recipe) -> dict[str, object]:
    return dict(train(recipe, communicator)["memory"])


def test_the_summary_has_the_memory_of_the_fullest_and_of_each_pipeline_rank(tmp_path: Path) -> None:
    """The first of them has two of three layers, and more micro-batches in flight."""
    wanted = recipe(tmp_path / "run", parallel__pipeline=2, model__layers=3)
    first, second = run("gloo", 2, memory_of, wanted)
    assert first == second == json.loads((tmp_path / "run/summary.json").read_text())["memory"]
    for entry in [first, *first["pipeline_ranks"]]:
        assert tuple(entry["predicted"]) == KINDS
        assert entry["measured"] == pytest.approx(sum(entry["predicted"].values()), rel=0.05)
        assert entry["process"] > entry["measured"]
    ranks = first.pop("pipeline_ranks")
    assert len(ranks) == 2
    assert ranks[0]["measured"] > 1.2 * ranks[1]["measured"]
    assert first == {**ranks[0], "process": max(rank["process"] for rank in ranks)}


def test_ranks_that_are_threads_measure_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first, _) = run("simulated", 2, memory_of, recipe(tmp_path / "two", parallel__pipeline=2))
    assert [entry["measured"] for entry in [first, *first["pipeline_ranks"]]] == [None] * 3
    assert capsys.readouterr().err.count("memory of the fullest rank, predicted: ") == 1
    (alone,) = run("simulated", 1, memory_of, recipe(tmp_path / "one"))
    assert alone["measured"] > 0


class Allocator:
    """Stands for a GPU's allocator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def take(self, size: int) -> None:
        """Takes that many bytes for a moment."""
        self.peak = max(self.peak, size)

    def reset(self, device: torch.device) -> None:
        self.peak = 0


def test_a_gpus_peak_is_that_of_the_first_two_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    allocator = Allocator(monkeypatch)

    def measured(communicator: Communicator, recipe: Recipe) -> tuple[int, int]:
        state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
        state.device = torch.device("cuda")
        memory = PeakMemory(state, communicator)
        allocator.take(900)  # while the model is filled
        for size in (500, 600, 800):
            with memory.counting():
                allocator.take(size)
        allocator.take(700)  # a validation
        return memory.summary()["measured"], memory.sum_of_peaks()

    assert run("simulated", 1, measured, recipe(tmp_path)) == [(600, 900)]


def filled_and_trained(communicator: Communicator, recipe: Recipe) -> int:
    torch.empty(2**28, dtype=torch.uint8, device=communicator.device)  # freed at once
    return int(train(recipe, communicator)["memory"]["measured"])


@pytest.mark.gpu
def test_what_a_gpu_held_before_the_first_step_is_not_in_its_peak(tmp_path: Path) -> None:
    (measured,) = run("simulated-cuda", 1, filled_and_trained, recipe(tmp_path))
    assert 0 < measured < 2**28
