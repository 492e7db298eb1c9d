"""From a recipe to one split on all ranks."""

import threading
from pathlib import Path

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.trainer.costs import choose_split as balancing
from bagualu.trainer.costs.choose_split import agree_on_shares, agree_on_split, relative_speeds
from bagualu.trainer.recipe.config import Recipe
from tests.harness import run
from tests.parity import small_recipe


def agreed(communicator: Communicator, recipe: Recipe) -> Split | str:
    parallel = recipe.parallel
    layout = parallel.layout(communicator.size)
    count = recipe.data.global_batch // (layout.data * recipe.train.micro_batch)
    schedule = compute_schedule(parallel.schedule, layout.pipeline, count, parallel.virtual_stages)
    try:
        split, table = agree_on_split(recipe, layout, schedule, communicator)
    except RecipeError as error:
        return str(error)
    assert (table is None) == (split.forecast is None)
    return split


def recipe(**changes: object) -> Recipe:
    return small_recipe(**{"parallel__pipeline": 2, "parallel__data": 2, **changes})


@pytest.mark.parametrize("balance", ["measured", "analytic"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_all_ranks_get_one_answer_that_holds_every_layer(balance: str, schedule: str, tmp_path: Path) -> None:
    wanted = recipe(parallel__balance=balance, parallel__speeds="measured", parallel__schedule=schedule, data__cache=str(tmp_path))
    splits = run("simulated", 4, agreed, wanted)
    assert all(split.forecast == splits[0].forecast is not None for split in splits)
    assert all(split == splits[0] for split in splits)
    assert [half for one in splits[0].slices for half in range(one.start, one.stop)] == list(range(8))
    assert len(splits[0].slices) == (4 if schedule == "zb_v" else 2)


def test_declared_speeds_and_a_heavy_head_are_followed() -> None:
    slow = run("simulated", 4, agreed, recipe(parallel__balance="analytic", parallel__speeds=[1.0, 0.3]))
    assert slow[0].counts == [3.5, 0.5]
    heavy = run("simulated", 4, agreed, recipe(parallel__balance="analytic", model__vocab=512))
    assert heavy[0].counts == [3.5, 0.5]


@pytest.mark.parametrize("balance", ["analytic", "uniform", [2, 2]])
def test_caps_that_do_not_fit_are_refused_on_every_rank(balance: object) -> None:
    answers = run("simulated", 4, agreed, recipe(parallel__balance=balance, parallel__memory_bytes=1000))
    assert len(set(answers)) == 1
    assert "pipeline rank" in answers[0]
    bytes_that_work = int(answers[0].rsplit("=", 1)[1])
    assert isinstance(
        run("simulated", 4, agreed, recipe(parallel__balance=balance, parallel__memory_bytes=bytes_that_work))[0], Split
    )


def test_uniform_and_lists_need_no_costs() -> None:
    assert run("simulated", 4, agreed, recipe(train__recompute="full"))[3] == Split(
        [LayerSlice(0, 4), LayerSlice(4, 8)], ["full"] * 4
    )
    assert run("simulated", 4, agreed, recipe(parallel__balance=[1, 3]))[0] == Split(
        [LayerSlice(0, 2), LayerSlice(2, 8)], ["none"] * 4
    )


@pytest.mark.parametrize(("balance", "source"), [("uniform", "measured"), ("measured", "measured"), ("analytic", "FLOPs")])
def test_a_number_of_bytes_is_kept_to_with_measured_costs(balance: str, source: str, tmp_path: Path) -> None:
    shared = {"parallel__balance": balance, "data__cache": str(tmp_path)}
    refused = run("simulated", 4, agreed, recipe(train__recompute="bytes:1", **shared))
    least = int(str(refused[0]).rsplit("bytes:", 1)[1])
    splits = run("simulated", 4, agreed, recipe(train__recompute=f"bytes:{least}", **shared))
    assert all(split == splits[0] for split in splits)
    assert "full" in splits[0].recompute
    assert splits[0].forecast.source.startswith(source)
    assert set(run("simulated", 4, agreed, recipe(train__recompute="bytes:1000000000", **shared))[0].recompute) == {"none"}


def agreed_shares(communicator: Communicator, recipe: Recipe) -> list[int]:
    return agree_on_shares(recipe, recipe.validate(communicator.size), communicator)


def test_replicas_of_unequal_speed_share_a_step_by_their_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2, half of the second replica, reaches half the FLOP/s of the others."""

    def ceiling(*_: object) -> float:
        return 1e9 if threading.current_thread().name == "rank-2" else 2.03e9

    monkeypatch.setattr(balancing, "matmul_ceiling", ceiling)
    small = small_recipe(parallel__data=2, parallel__tensor=2, parallel__shares="measured", data__global_batch=12)
    assert run("simulated", 4, agreed_shares, small) == [[8, 4]] * 4
    small.parallel.shares = [7, 5]
    assert run("simulated", 4, agreed_shares, small) == [[7, 5]] * 4
    small.parallel.shares = None
    assert run("simulated", 4, agreed_shares, small) == [[6, 6]] * 4


def test_the_slowest_replica_counts_and_noise_does_not() -> None:
    layout = Layout(pipeline=2, data=2)
    assert relative_speeds([1.0, 1.01, 0.98, 1.02], layout) == [1.0, 1.0]
    assert relative_speeds([2.0, 2.0, 2.0, 1.0], layout) == [1.0, 0.5]
    assert relative_speeds([2.0, 1.0, 2.0, 2.0], layout) == [0.5, 1.0]  # rank 0 measured the costs, its neighbour is slow
