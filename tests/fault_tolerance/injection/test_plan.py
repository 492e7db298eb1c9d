"""A fault plan is read from what was typed, refused with the fix, and drawn from the seed alone."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagualu.comm.errors import RecipeError
from bagualu.comm.monitor import Phase
from bagualu.fault_tolerance.injection.kinds import KINDS, Corrupt, DropLink, Flip, Kill, Slow, Stop
from bagualu.fault_tolerance.injection.plan import DRAWN, Setting, draw, parse, resolve
from bagualu.trainer.recipe.compose import compose, load_recipe, save_recipe

SETTING = Setting(seed=1, steps=60, ranks=4, checkpoint_every=4)


def test_what_is_typed_is_what_is_planned():
    recipe = compose(
        ["faults=[kill@step=5:rank=2:at=backward, slow@step=3:rank=1:steps=10:factor=3, stop@step=9:seconds=2.5, corrupt@step=10]"]
    )
    assert recipe.planned_faults(4) == [
        Kill(5, 2, "backward"), Slow(3, 1, steps=10, factor=3.0), Stop(9, 0, seconds=2.5), Corrupt(10, what="checkpoint"),
    ]  # fmt: skip
    assert compose(["faults=drop_link@step=6:rank=3:how=block"]).planned_faults(4) == [DropLink(6, 3, how="block")]
    assert compose(["faults=flip@step=8:what=master"]).planned_faults(4) == [Flip(8, what="master")]
    assert compose([]).planned_faults(4) == []


def test_the_plan_of_a_run_is_in_its_config(tmp_path):
    recipe = compose(["faults=[random:3, nan@step=7]", f"run.dir={tmp_path}"])
    plan = recipe.planned_faults(4)
    recipe.faults = [str(fault) for fault in plan]
    assert load_recipe(save_recipe(recipe)).planned_faults(4) == plan


@given(st.sampled_from(sorted(KINDS)), st.integers(1, 99), st.integers(0, 9), st.sampled_from(sorted(Phase)))
def test_a_fault_is_typed_as_it_is_shown(kind, step, rank, point):
    known = KINDS[kind].points or tuple(Phase)
    fault = KINDS[kind](step=step, rank=rank, at=point if point in known else known[0])
    assert parse(str(fault)) == fault


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("bomb@step=3", "give one of kill, exception, stop, slow, corrupt, full_disk, nan, flip, drop_link, e.g. faults=[kill"),
        ("kill", "give e.g. kill@step=5"),
        ("kill@rank=1", "give e.g. kill@step=5"),
        ("kill@step=soon", "step takes an integer, not 'soon'"),
        ("kill@step=3:when=now", "kill has no 'when', only step, rank, at"),
        ("kill@step=3:at=lunch", "give at= one of fetch, load, verify, restore, data, forward, backward"),
        ("nan@step=3:at=optimizer", "give at= one of data"),
        ("kill@step=0", "step must be at least 1"),
        ("kill@step=3:rank=4", "give rank=0 to rank=3"),
        ("kill@step=101", "train.steps=100"),
        ("flip@step=3:what=hair", "give what=weight or what=master or what=moment or what=gradient"),
        ("stop@step=3:seconds=-1", "seconds must be at least 0"),
        ("slow@step=3:factor=nan", "factor must be at least 0"),
        ("random", "give e.g. faults=random:20"),
        ("random:many", "give e.g. faults=random:20"),
        ("random:3:kill+bomb", "give e.g. faults=random:20"),
        ("random:100", "give train.steps=101 or more"),
    ],
)
def test_a_wrong_fault_is_refused_with_the_fix(typed, message):
    with pytest.raises(RecipeError) as error:
        resolve([typed], Setting(0, 100, 4, 10))
    assert message in str(error.value)
    assert typed.split(":")[0] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["3", "[3]", "null", "true"])
def test_what_is_no_list_of_faults_is_refused(value):
    with pytest.raises(RecipeError, match=r"e\.g\. faults="):
        compose([f"faults={value}"]).validate(4)


def test_words_with_an_equals_sign_need_no_quotes_anywhere():
    recipe = compose(["launch.slurm.directives=[--mem=4G, \"--comment=a, b\", '--x=y']", 'launch.slurm.setup=["export A=1"]'])
    assert recipe.launch.slurm.directives == ["--mem=4G", "--comment=a, b", "--x=y"]
    assert recipe.launch.slurm.setup == ["export A=1"]


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 16), st.integers(0, 10))
def test_a_drawn_plan_is_a_function_of_its_setting(seed, count, ranks, every):
    setting = Setting(seed, 60, ranks, every)
    plan = draw(count, setting)
    assert plan == draw(count, setting) == resolve(f"random:{count}", setting)
    assert len(plan) == count
    assert len({fault.step for fault in plan}) == count, "two in one step would look like a crash loop"
    assert all(fault.kind in DRAWN and 0 <= fault.rank < ranks and 1 < fault.step <= 60 for fault in plan)
    damage = [fault.step for fault in plan if fault.kind in ("corrupt", "full_disk")]
    assert all(later - earlier > 2 * every for earlier, later in pairwise(damage))


def test_a_drawn_plan_has_all_kinds_and_ranks_and_depends_on_the_seed():
    drawn = [fault for seed in range(40) for fault in draw(20, Setting(seed, 60, 4, 4))]
    assert set(Counter(fault.kind for fault in drawn)) == set(DRAWN)
    assert set(Counter(fault.rank for fault in drawn)) == {0, 1, 2, 3}
    assert draw(20, Setting(0, 60, 4, 4)) != draw(20, Setting(1, 60, 4, 4))
    assert {fault.kind for fault in resolve("random:20:kill+slow", SETTING)} == {"kill", "slow"}
    assert all(fault.seconds == 0.5 for fault in drawn if fault.kind == "stop"), "a hang would take minutes"


def test_a_gradient_that_is_not_finite_is_drawn_only_where_its_step_is_computed_again():
    kinds = [{fault.kind for fault in compose(words).planned_faults(4)} for words in (
        ["faults=random:60"], ["faults=random:60", "guard.on_nonfinite=skip"], ["faults=random:60", "train.dtype=float16"],
    )]  # fmt: skip
    assert "nan" in kinds[0]
    assert "nan" not in kinds[1] | kinds[2]
