"""A recipe that cannot fit is refused with by how much, and what the message says makes it fit."""

from typing import Any

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.parallel.config import ParallelConfig
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.trainer.costs import fits
from bagualu.trainer.costs.fits import Device, check_memory, device_of
from bagualu.trainer.costs.plan_split import plan_split
from bagualu.trainer.costs.prediction import Memory, fullest, predict
from bagualu.trainer.recipe.config import Recipe
from tests.parity import small_recipe

KIB = 2**10


def refusal(recipe: Recipe, world: int, device: Device | None) -> str:
    with pytest.raises(RecipeError) as refused:
        check_memory(recipe, world, device)
    (line,) = str(refused.value).splitlines()
    return line


def memories(recipe: Recipe, world: int) -> list[Memory]:
    layout = recipe.validate(world)
    schedule = compute_schedule(recipe.parallel.schedule, layout.pipeline, recipe.micro_batches() // layout.data, None)
    return predict(recipe, layout, plan_split(recipe, layout, schedule)[0], schedule)


def changed(changes: dict[str, Any], typed: str) -> Recipe:
    """The recipe with overrides as typed."""
    keys = {key.replace(".", "__"): value for key, _, value in (word.partition("=") for word in typed.split())}
    return small_recipe(**changes | {key: int(value) if value.isdigit() else value for key, value in keys.items()})


# what needs too much, on how many ranks, KiB of the device, the fixes that the message gives
CASES: list[tuple[dict[str, Any], int, int, list[str]]] = [
    ({"parallel__zero": 0}, 4, 380, ["parallel.zero=1", "parallel.zero=2"]),
    ({"parallel__zero": 0}, 4, 260, ["parallel.zero=2", "parallel.zero=3"]),
    ({"train__micro_batch": 8, "data__sequence_length": 32}, 1, 1200, ["train.recompute=full", "train.micro_batch=2"]),
    ({"parallel__zero": 3, "train__recompute": "full"}, 4, 152, ["parallel.tensor=2", "parallel.pipeline=4"]),
    (
        {"parallel__zero": 0, "train__micro_batch": 2, "data__sequence_length": 64},
        4,
        400,
        ["parallel.zero=3 train.recompute=full train.micro_batch=1"],
    ),
    ({"train__micro_batch": 8}, 1, 40, ["a smaller model or a shorter data.sequence_length"]),
]


@pytest.mark.parametrize(("changes", "world", "size", "fixes"), CASES)
def test_the_cheapest_changes_that_fit_are_named(changes: dict[str, Any], world: int, size: int, fixes: list[str]) -> None:
    device = Device(size * KIB, "each of 4 workers on this machine")
    line = refusal(small_recipe(**changes), world, device)
    assert line.startswith("the fullest rank needs ")
    assert line.endswith(f" of {device.what}; give {' or '.join(fixes)}")
    for fix in fixes:
        if "=" in fix:
            check_memory(changed(changes, fix), world, device)


def test_it_says_by_how_much_and_of_what() -> None:
    recipe = small_recipe(parallel__zero=0)
    line = refusal(recipe, 4, Device(380 * KIB, "its GPU"))
    need = float(line.split(" needs ")[1].split(" KiB")[0])
    assert f"): {need - 380:.1f} KiB more than the 380.0 KiB of its GPU; give " in line
    assert " KiB parameters, " in line
    assert " KiB moments, " in line
    check_memory(recipe, 4, Device(int(need + 1) * KIB, "its GPU"))
    check_memory(recipe, 4, None)


def test_a_limit_of_the_recipe_is_refused_with_the_same_changes() -> None:
    recipe = small_recipe(parallel__zero=0, parallel__memory_bytes=330_000)
    line = refusal(recipe, 4, device_of(recipe, 4))
    assert " bytes but parallel.memory_bytes allows 330000; give parallel.zero=1 or parallel.zero=2 or " in line
    for fix in line.partition("; give ")[2].split(" or "):
        if fix != "parallel.balance=analytic":  # has no effect without a pipeline
            check_memory(changed({"parallel__memory_bytes": 330_000}, fix), 4, None)


def test_a_device_is_a_part_of_the_machine() -> None:
    recipe = small_recipe(comm__backend="gloo")
    alone, shared = device_of(recipe, 1), device_of(recipe, 4)
    assert alone is not None
    assert shared is not None
    assert shared.memory_bytes == alone.memory_bytes // 4 > 0


def test_a_long_schedule_is_not_planned_in_full() -> None:
    """The memory of so many micro-batches is that of a few, but for their tokens."""
    few, many = (small_recipe(parallel__pipeline=2, data__global_batch=count) for count in (8, 2**16))
    limits = []
    for recipe in (few, many):
        need = refusal(recipe, 2, Device(1, "nothing")).split(" needs ")[1]
        limits.append(need.split(" activations")[0].rpartition(", ")[2])
    assert limits[0] == limits[1]


def test_a_recipe_is_not_refused_for_what_a_prediction_may_be_too_high() -> None:
    recipe = small_recipe(parallel__zero=0)
    need = float(refusal(recipe, 4, Device(1, "nothing")).split(" needs ")[1].split(" KiB")[0]) * KIB
    check_memory(recipe, 4, Device(int(need / 1.04), "its GPU"))
    assert refusal(recipe, 4, Device(int(need / 1.06), "its GPU"))


def test_a_limit_of_the_recipe_does_not_replace_that_of_the_device() -> None:
    recipe = small_recipe(parallel__memory_bytes=10**15, comm__backend="gloo")
    assert device_of(recipe, 4) == device_of(small_recipe(comm__backend="gloo"), 4)
    assert refusal(recipe, 4, Device(100 * KIB, "its GPU")).startswith("the fullest rank needs ")


@pytest.mark.parametrize(
    "changes", [{"parallel__memory_bytes": 1000}, {"parallel__balance": "uniform", "train__recompute": "bytes:1"}], ids=str
)
def test_what_no_measured_costs_can_make_fit_is_refused_before(changes: dict[str, Any]) -> None:
    recipe = small_recipe(**{"parallel__pipeline": 2, "parallel__balance": "measured", **changes})
    least = refusal(recipe, 2, None).rpartition("=")[2]
    key = "train__recompute" if "train__recompute" in changes else "parallel__memory_bytes"
    value: object = least if least.startswith("bytes:") else int(least)
    check_memory(small_recipe(**{"parallel__pipeline": 2, "parallel__balance": "measured", **changes, key: value}), 2, None)


WHOLE = {"parallel__bucket_bytes": ParallelConfig.bucket_bytes, "train__dtype": "float32"}


@pytest.mark.parametrize(
    ("changes", "world", "fix"),
    [
        ({**WHOLE, "parallel__engine": "fsdp", "parallel__shard": 2}, 4, "parallel.shard=4"),
        ({"train__micro_batch": 2, "data__sequence_length": 64}, 1, "train.recompute=attention"),
        ({"train__dtype": "float32", "parallel__engine": "deepspeed", "comm__backend": "nccl"}, 2, "parallel.deepspeed.offload="),
        ({"comm__backend": "nccl", "train__micro_batch": 2, "data__sequence_length": 64}, 1, "train.offload_bytes=1073741824"),
        ({"parallel__data": 1}, 1, "2 ranks with as much memory each: parallel.data=2"),
    ],
    ids=str,
)
def test_the_advice_has_every_kind_of_change(changes: dict[str, Any], world: int, fix: str) -> None:
    """On some device, it is one of the cheapest."""
    need = fullest(memories(small_recipe(**changes), world))
    lines = []
    for percent in range(20, 96, 5):
        try:
            check_memory(small_recipe(**changes), world, Device(sum(need.values()) * percent // 100, "its GPU"))
        except RecipeError as error:
            lines.append(str(error).partition("; give ")[2])
    assert any(fix in line for line in lines), lines


def test_a_limit_that_the_device_does_not_have_is_not_advised() -> None:
    recipe = small_recipe(parallel__memory_bytes=1000, train__micro_batch=1)
    need = sum(fullest(memories(small_recipe(train__micro_batch=1), 1)).values())
    for device, advised in ((need, True), (need // 2, False)):
        fix = refusal(recipe, 1, Device(device, "this machine")).partition("; give ")[2]
        assert ("parallel.memory_bytes=" in fix) == advised, fix


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "v_half", "dualpipe_v"])
@pytest.mark.parametrize("micro_batches", [1, 5, 7, 14, 22, 33])
def test_not_all_micro_batches_need_planning(schedule: str, micro_batches: int) -> None:
    """The schedules of many micro-batches are long, and what is in flight repeats."""
    for zero in (1, 2, 3):
        recipe = small_recipe(
            parallel__pipeline=2, parallel__schedule=schedule, parallel__zero=zero, data__global_batch=2 * micro_batches
        )
        assert fits.memories(recipe, recipe.validate(4)) == memories(recipe, 4)
