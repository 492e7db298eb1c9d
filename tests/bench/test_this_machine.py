"""The cases of tests/bench/this_machine.py: each axis and each schedule, as recipes that can run."""

import sys
from pathlib import Path

import pytest

from bagualu.parallel.pipeline.registry import SCHEDULES
from bagualu.trainer.recipe.compose import compose

sys.path.insert(0, str(Path(__file__).parent))

from this_machine import Case, arguments, cases

ALL = cases(arguments(["--cluster", "this.yaml"]))


def test_each_axis_and_each_schedule_is_a_case_of_both_recipes() -> None:
    variants = {(case.recipe, case.entry.variant) for case in ALL}
    for recipe in ("bench_dense", "bench_moe"):
        assert variants >= {(recipe, variant) for variant in ("", "data", "tensor", *SCHEDULES)}
    assert ("bench_moe", "expert") in variants
    assert ("bench_dense", "expert") not in variants


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.recipe}-{case.entry.name}")
def test_a_case_is_a_recipe_of_its_processes_whose_stages_do_not_depend_on_measuring(case: Case) -> None:
    recipe = compose([*case.words(), "comm.backend=gloo"])
    layout = recipe.validate(case.entry.processes)
    assert layout.world == case.entry.processes
    assert recipe.parallel.balance != "measured"
    if case.entry.axis:
        assert layout.size(case.entry.axis) == 2
