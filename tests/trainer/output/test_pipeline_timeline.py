"""A run writes down when its pipeline's passes were done, as its schedule has them."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.group import Communicator
from bagualu.parallel.pipeline.recorded_timeline import check_against, read_measured
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.trainer import run as whole_run
from bagualu.trainer.recipe.config import Recipe
from tests.harness import run
from tests.parity import small_recipe


def train(communicator: Communicator, recipe: Recipe) -> dict[str, Any]:
    return whole_run.train(recipe, communicator)


@pytest.mark.parametrize(("steps", "recorded"), [(5, 3), (1, 1)])
def test_one_step_is_recorded(tmp_path: Path, steps: int, recorded: int) -> None:
    recipe = small_recipe(
        run__dir=str(tmp_path), train__steps=steps, log__progress="off", train__validation_sequences=0, checkpoint__every=0,
        parallel__pipeline=2, parallel__data=2, parallel__schedule="zb_v",
    )  # fmt: skip
    run("simulated", 4, train, recipe)
    measured = read_measured(tmp_path / "pipeline.jsonl")
    assert measured.step == recorded
    check_against(measured, compute_schedule("zb_v", 2, 4))
    for spans in measured.timeline.ranks:
        assert all(before.end <= after.start for before, after in pairwise(spans))
    done = {span.action: span for spans in measured.timeline.ranks for span in spans}
    for action, span in done.items():
        if action.kind == "F" and action.stage:
            assert done[replace(action, stage=action.stage - 1)].end <= span.start, "nothing before its input"


def test_without_a_pipeline_there_is_nothing_to_record(tmp_path: Path) -> None:
    recipe = small_recipe(
        run__dir=str(tmp_path), train__steps=4, log__progress="off", train__validation_sequences=0, checkpoint__every=0
    )
    run("simulated", 1, train, recipe)
    assert not (tmp_path / "pipeline.jsonl").exists()
