"""A recipe that cannot fit is refused with by how much, and what the message says makes it fit."""

from typing import Any

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.trainer.costs.fits import Device, check_memory, device_of
from bagualu.trainer.recipe.config import Recipe
from tests.parity import small_recipe

KIB = 2**10


def refusal(recipe: Recipe, world: int, device: Device | None) -> str:
    with pytest.raises(RecipeError) as refused:
        check_memory(recipe, world, device)
    (line,) = str(refused.value).splitlines()
    return line


def changed(changes: dict[str, Any], typed: str) -> Recipe:
    """The recipe with overrides as typed."""
    keys = {key.replace(".", "__"): value for key, _, value in (word.partition("=") for word in typed.split())}
    return small_recipe(**changes | {key: int(value) if value.isdigit() else value for key, value in keys.items()})


# what needs too much, on how many ranks, KiB of the device, the fixes that the message gives
CASES: list[tuple[dict[str, Any], int, int, list[str]]] = [
    ({"parallel__zero": 0}, 4, 400, ["parallel.zero=1", "parallel.zero=2"]),
    ({"parallel__zero": 0}, 4, 260, ["parallel.zero=2", "parallel.zero=3"]),
    ({"train__micro_batch": 8, "data__sequence_length": 32}, 1, 1200, ["train.recompute=full", "train.micro_batch=2"]),
    ({"parallel__zero": 3, "train__recompute": "full"}, 4, 160, ["parallel.tensor=2", "parallel.pipeline=4"]),
    (
        {"parallel__zero": 0, "train__micro_batch": 2, "data__sequence_length": 64},
        4,
        400,
        ["parallel.zero=3 train.recompute=full train.micro_batch=1"],
    ),
    ({"train__micro_batch": 8}, 1, 40, ["more ranks, a smaller model or a shorter data.sequence_length"]),
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
    line = refusal(recipe, 4, Device(400 * KIB, "its GPU"))
    need = float(line.split(" needs ")[1].split(" KiB")[0])
    assert f"): {need - 400:.1f} KiB more than the 400.0 KiB of its GPU; give " in line
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
