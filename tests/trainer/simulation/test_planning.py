"""A plan proposes only what `train` accepts and what fits, keeps what the user gives, and says what would make a model fit."""

import random
import re
from contextlib import suppress
from functools import cache
from importlib.resources import files

import pytest

from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.errors import RecipeError
from bagualu.parallel.planner.layouts import Degrees, PlannedLayout, degrees, layouts
from bagualu.parallel.planner.search import Effort
from bagualu.trainer.costs.fits import Device, check_memory
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.simulation import planning
from bagualu.trainer.simulation.planning import find_layouts
from bagualu.trainer.simulation.search_space import plannable, search_space
from tests.trainer.simulation.test_estimate import DENSE, MIXTURE, costs_of

QUICK = Effort(fitting=4, most_exact=2)
FEW = ["parallel.sequence=true", "train.micro_batch=1"]


def find(words, world=16, cluster="h100", effort=QUICK):
    return find_layouts(compose(list(words)), load_cluster(cluster), world, given(words), effort, lambda: 0.0)


def given(words):
    return [word.partition("=")[0] for word in words]


@cache
def plan_of(*words):
    return find(words)


@pytest.mark.parametrize("words", [DENSE, MIXTURE])
def test_drawn_layouts_are_valid_recipes(words):
    """Each that divides is accepted by the recipe's own checks; `need` returns None for any that is not."""
    costs, cluster = costs_of(tuple(words), 16), load_cluster("h100").for_world(16)
    space = search_space(costs.recipe, cluster, 16, [])
    every = [layout for of in degrees(space) for layout in layouts(space, of)]
    for layout in random.Random(7).sample(every, 60):
        costs.recipe_of(layout).validate(16)
        assert costs.need(layout) is not None


def test_what_is_ranked_is_accepted_and_fits():
    plan = plan_of(*DENSE, *FEW)
    assert plan.ranked
    chip = load_cluster("h100").parts[0].chip
    for one in plan.ranked:
        recipe = costs_of(tuple(DENSE), 16).recipe_of(one.layout)
        preflight.check(recipe, 16)
        check_memory(recipe, 16, Device(chip.memory_bytes - chip.context_bytes, "its GPU"))
        assert one.exact.fits
        assert one.exact.layout.world == 16
    seconds = [one.exact.step_seconds for one in plan.ranked]
    assert seconds == sorted(seconds)


def test_what_the_user_gives_is_kept():
    plan = find([*DENSE, *FEW, "parallel.tensor=4", "parallel.zero=2", "train.recompute=full"])
    for one in [*plan.ranked, *plan.others]:
        values = one.layout.values()
        kept = {key: values[key] for key in ("parallel.tensor", "parallel.zero", "train.recompute", "train.micro_batch")}
        assert kept == {"parallel.tensor": 4, "parallel.zero": 2, "train.recompute": "full", "train.micro_batch": 1}


def test_a_mixed_cluster_gets_unequal_stages_or_shares():
    plan = find([*DENSE, *FEW, "parallel.tensor=4"], cluster="mixed_h100_a100")
    best = plan.ranked[0].layout
    assert best.balance != "uniform" or best.shares is not None


def shrunk(tmp_path, part):
    """A mixed cluster from files whose A100 have only `part` of the memory that equal stages need there, and the layout."""
    words = [*DENSE, "parallel.tensor=1", "parallel.pipeline=2", "parallel.schedule=1f1b", "parallel.sequence=false",
             "train.micro_batch=1", "train.recompute=full", "parallel.zero=1"]  # fmt: skip
    costs = costs_of(tuple(words), 16)
    of = Degrees(data=8, tensor=1, pipeline=2, expert=1, micro_batch=1, sequence=False)
    need = costs.need(PlannedLayout(of, "1f1b", None, "full", 1))
    for name, file in {"mine": "mixed_h100_a100", "small": "a100"}.items():
        text = (files("bagualu.recipes") / "cluster" / f"{file}.yaml").read_text()
        chip = load_cluster("a100").parts[0].chip
        text = re.sub(r"(?m)^  a100:", "  small:", text)
        text = re.sub(r"(?m)^  memory_bytes: .*", f"  memory_bytes: {chip.context_bytes + int(part * need.bytes)}", text)
        (tmp_path / f"{name}.yaml").write_text(text)
    return words, load_cluster(str(tmp_path / "mine.yaml"), [tmp_path])


def test_a_mixed_cluster_whose_smaller_chips_do_not_hold_equal_stages_gets_unequal_ones(tmp_path):
    words, cluster = shrunk(tmp_path, 0.8)
    plan = find_layouts(compose(words), cluster, 16, given(words), QUICK, lambda: 0.0)
    first, second = plan.ranked[0].layout.balance
    assert first > second
    assert plan.ranked[0].exact.fits


def test_a_mixed_cluster_is_refused_only_if_unequal_stages_do_not_fit_either(tmp_path):
    words, cluster = shrunk(tmp_path, 0.1)
    with pytest.raises(RecipeError, match="no layout on world=16 fits"):
        find_layouts(compose(words), cluster, 16, given(words), QUICK, lambda: 0.0)


def test_products_in_float8_are_planned():
    words = [*DENSE, *FEW, "parallel.tensor=2", "parallel.pipeline=1", "parallel.zero=1", "train.recompute=none"]
    wide, narrow = plan_of(*words), find([*words, "train.dtype=float8"])
    assert narrow.ranked[0].layout == wide.ranked[0].layout
    before, after = wide.ranked[0].parts.seconds, narrow.ranked[0].parts.seconds
    assert after["matrix products"] < 0.6 * before["matrix products"]
    assert after["other kernels"] > before["other kernels"], "matrices are converted"
    useful = [one.ranked[0].exact.mfu * one.ranked[0].exact.step_seconds for one in (wide, narrow)]
    assert useful[0] == pytest.approx(useful[1]), "the peak is that of bfloat16, as in a run"


def refused(words, world=16, cluster="h100"):
    with pytest.raises(RecipeError) as error:
        find(words, world, cluster)
    (line,) = str(error.value).splitlines()
    return line


def test_a_model_that_fits_nowhere_is_refused_with_what_would_fit():
    large = [*DENSE, "model.layers=16", "model.hidden=16384", "model.heads=128", "model.kv_heads=128", "model.ffn=65536"]
    line = refused(large, 8)
    excess = re.search(r"needs ([\d.]+) GiB on its fullest rank, ([\d.]+) GiB more than its device of h100 has; give (.*)", line)
    needed, more = float(excess[1]), float(excess[2])
    chip = load_cluster("h100").parts[0].chip
    assert needed - more == pytest.approx((chip.memory_bytes - chip.context_bytes) / 2**30, abs=0.1)
    world = int(re.search(r"world=(\d+)", excess[3])[1])
    cluster = load_cluster("h100")
    recipe = plannable(compose(large), cluster.for_world(8), given(large))
    assert planning._fits(recipe, cluster, world, given(large))
    assert not planning._fits(recipe, cluster, world // 2, given(large))


def test_keys_that_keep_a_model_from_fitting_are_named():
    large = [*DENSE, "data.sequence_length=262144", "data.global_batch=16", "train.recompute=none", "parallel.tensor=1"]
    line = refused([*large, "parallel.pipeline=1"])
    assert "leave out parallel.pipeline parallel.tensor train.recompute" in line


@pytest.mark.parametrize(
    ("words", "world", "says"),
    [
        ([], 13, "world=13: no layout divides the model and data.global_batch=32; give world=12"),
        (["parallel.tensor=3"], 16, "16 ranks do not divide into tensor 3"),
        (["parallel.pipeline=16"], 16, "model.layers=8"),
        (["parallel.engine=deepspeed"], 16, "parallel.engine=native"),
    ],
)
def test_wrong_input_is_refused_in_one_line(words, world, says):
    assert says in refused([*DENSE, *words], world)


def test_a_world_that_is_advised_has_a_layout():
    cluster = load_cluster("h100")
    for world in (13, 17, 23):
        recipe = compose(DENSE)
        advised = None
        with suppress(RecipeError):
            search_space(recipe, cluster.for_world(world), world, [])
            advised = world
        if advised is None:
            with pytest.raises(RecipeError) as error:
                search_space(recipe, cluster.for_world(world), world, [])
            advised = int(re.search(r"give world=(\d+)", str(error.value))[1])
        assert any(True for of in degrees(search_space(recipe, cluster.for_world(advised), advised, [])) if of)
