"""A rank that is slow in a real run stands in the metrics while it is, and in the summary."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.group import Communicator
from bagualu.trainer import run as whole_run
from bagualu.trainer.recipe.config import Recipe
from tests.harness import run
from tests.parity import small_recipe


class Slow:
    """Takes its time in every forward pass."""

    def at(self, point: str, step: int) -> None:
        if point == "forward":
            time.sleep(0.15)

    def waits(self, what: str | None) -> None:
        return None


def train(communicator: Communicator, recipe: Recipe, slow: int) -> dict[str, Any]:
    if communicator.rank == slow:
        communicator.monitor.observers.append(Slow())
    return whole_run.train(recipe, communicator)


def test_it_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_recipe(run__dir=str(tmp_path), train__steps=27, parallel__data=2, train__micro_batch=4, log__progress="off",
                          train__validation_sequences=0, straggler__window_seconds=0.1)  # fmt: skip
    summaries = run("simulated", 2, train, recipe, 1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    flagged = [line for line in lines if "stragglers" in line]
    assert flagged
    assert flagged[-1]["step"] == 27
    assert flagged[0]["step"] <= 25  # 5 steps to warm up, then 4 windows of 5
    evidence = flagged[-1]["stragglers"][0]
    assert evidence["rank"] == 1
    assert evidence["own_seconds"] > 0.15 > evidence["peer_seconds"]
    assert all([one["rank"] for one in summary["stragglers"]] == [1] for summary in summaries)
    assert "rank 1 is slow: " in capsys.readouterr().err
