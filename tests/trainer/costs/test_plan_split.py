"""A split is judged by the memory that is predicted for the run, not by that of its layers alone."""

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.config import ParallelConfig
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.trainer.costs.plan_split import plan_split
from bagualu.trainer.costs.prediction import predict
from bagualu.trainer.recipe.config import Recipe
from tests.parity import small_recipe

LIMITED: list[dict[str, object]] = [
    {"parallel__data": 2, "parallel__zero": 2},
    {"parallel__data": 4, "parallel__zero": 3},
    {"parallel__data": 2, "parallel__engine": "fsdp", "parallel__bucket_bytes": ParallelConfig.bucket_bytes},
    {"train__offload_bytes": 10**6},
    {"parallel__data": 2, "parallel__pipeline": 2, "parallel__zero": 3, "parallel__balance": "analytic"},
    {"parallel__data": 2, "parallel__pipeline": 2, "parallel__zero": 2, "train__recompute": "auto"},
    {"parallel__pipeline": 2, "parallel__schedule": "zb_v", "train__recompute": "auto"},
]


def planned(changes: dict[str, object], limit: int) -> tuple[Split, list[int]]:
    """The split, and the bytes predicted for each pipeline rank."""
    recipe: Recipe = small_recipe(**changes, parallel__memory_bytes=limit)
    layout = recipe.validate(recipe.parallel.pipeline * (recipe.parallel.data or 1))
    schedule = compute_schedule(recipe.parallel.schedule, layout.pipeline, recipe.micro_batches() // layout.data, None)
    split, _ = plan_split(recipe, layout, schedule)
    return split, [sum(memory.values()) for memory in predict(recipe, layout, split, schedule)]


@pytest.mark.parametrize("changes", LIMITED, ids=str)
def test_the_least_limit_that_an_error_names_is_kept_to(changes: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"needs .* bytes but parallel.memory_bytes allows 1000") as refused:
        planned(changes, 1000)
    limit = int(str(refused.value).rsplit("=", 1)[1])
    split, needs = planned(changes, limit)
    assert split.forecast is not None
    assert split.forecast.memory_bytes == needs
    assert max(needs) <= limit


def test_what_is_left_of_a_limit_keeps_gathered_weights() -> None:
    changes: dict[str, object] = {"parallel__data": 2, "parallel__zero": 3}
    tight, loose = (planned(changes, limit)[0].forecast for limit in (300_000, 10**9))
    assert tight is not None
    assert loose is not None
    assert tight.memory_bytes[0] + tight.spare_bytes[0] >= 300_000
    assert tight.memory_bytes[0] <= 300_000
    assert loose.memory_bytes[0] > tight.memory_bytes[0]
    assert planned({**changes, "parallel__zero": 2}, 10**9)[0].forecast.spare_bytes == []  # type: ignore[union-attr]
