"""The memory that `predict` gives for a split, and what a search for splits must reserve so that its memory is the same."""

from collections.abc import Iterable
from dataclasses import replace

from bagualu.parallel.balance.stages.cost import CostTable
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.balance.stages.keys import memory_caps
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.schedules.schedule import Schedule
from bagualu.trainer.costs.prediction import predict
from bagualu.trainer.recipe.config import Recipe


def with_prediction(recipe: Recipe, layout: Layout, split: Split, schedule: Schedule, micro_batches: int | None = None) -> Split:
    """Returns `split`, which has a forecast, with the memory that `predict` gives for it and, under ZeRO-3, with the bytes of
    gathered weights that ranks may keep. `micro_batches` as in `predict`."""
    assert split.forecast is not None
    caps = memory_caps(recipe.parallel.memory_bytes, layout.pipeline)
    spare: list[int] = []
    if caps is not None and recipe.parallel.engine == "native" and recipe.parallel.zero_stage == 3:
        needs = _totals(recipe, layout, _with_spare(split, []), schedule, micro_batches)
        spare = [max(0, cap - need) for cap, need in zip(caps, needs, strict=True)]
    predicted = _with_spare(split, spare)
    assert predicted.forecast is not None
    needs = _totals(recipe, layout, predicted, schedule, micro_batches)
    return replace(predicted, forecast=replace(predicted.forecast, memory_bytes=needs))


def keeps_to_caps(recipe: Recipe, split: Split) -> bool:
    """Returns whether a split that `with_prediction` returned fits parallel.memory_bytes."""
    assert split.forecast is not None
    needs = split.forecast.memory_bytes
    caps = memory_caps(recipe.parallel.memory_bytes, len(needs))
    return caps is None or all(need <= cap for need, cap in zip(needs, caps, strict=True))


def with_reserved(
    recipe: Recipe, layout: Layout, table: CostTable, schedule: Schedule, splits: Iterable[Split], micro_batches: int | None = None
) -> CostTable:
    """Returns `table` with as many reserved bytes that the memory of `splits`, whose forecasts were made with `table`, is at least
    that which `predict` gives for them."""
    before = table.reserved_bytes or [0] * layout.pipeline
    most = list(table.reserved_bytes)
    for split in splits:
        assert split.forecast is not None
        needs = _totals(recipe, layout, _with_spare(split, []), schedule, micro_batches)
        besides = [old + need - known for old, need, known in zip(before, needs, split.forecast.memory_bytes, strict=True)]
        most = list(map(max, most, besides)) if most else besides
    return replace(table, reserved_bytes=most)


def _with_spare(split: Split, spare: list[int]) -> Split:
    assert split.forecast is not None
    return replace(split, forecast=replace(split.forecast, spare_bytes=spare))


def _totals(recipe: Recipe, layout: Layout, split: Split, schedule: Schedule, micro_batches: int | None) -> list[int]:
    return [sum(memory.values()) for memory in predict(recipe, layout, split, schedule, micro_batches)]
