"""A run predicts its memory by kind and measures its peak, and says both."""

import json
from pathlib import Path

import pytest

from bagualu.comm.group import Communicator
from bagualu.parallel.memory_kinds import KINDS
from bagualu.trainer.output.progress import summary_text
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


def test_the_summary_has_the_memory_of_the_fullest_rank(tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "run", parallel__pipeline=2)
    first, second = run("gloo", 2, memory_of, wanted)
    assert first == second == json.loads((tmp_path / "run/summary.json").read_text())["memory"]
    assert tuple(first["predicted"]) == KINDS
    assert first["measured"] == pytest.approx(sum(first["predicted"].values()), rel=0.05)
    assert first["process"] > first["measured"]


def test_ranks_that_are_threads_measure_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first, _) = run("simulated", 2, memory_of, recipe(tmp_path / "two", parallel__pipeline=2))
    assert first["measured"] is None
    assert capsys.readouterr().err.count("memory of the fullest rank, predicted: ") == 1
    (alone,) = run("simulated", 1, memory_of, recipe(tmp_path / "one"))
    assert alone["measured"] > 0


def test_the_closing_summary_shows_both() -> None:
    memory = {"predicted": {"parameters": 2**20, "moments": 2**21}, "measured": 2**20 * 2.9, "process": 2**30}
    ended = {"step": 1, "steps": 1, "memory": memory}
    assert "memory  2.9 MiB of tensors, 3.0 MiB predicted, on the fullest rank; its process 1,024 MiB" in summary_text(ended)
    memory["measured"] = None
    assert "memory  3.0 MiB predicted, on the fullest rank; its process" in summary_text(ended)
