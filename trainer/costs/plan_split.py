"""Splits a recipe's layers over stages without measuring anything."""

from collections.abc import Sequence
from dataclasses import replace

from bagualu.comm.errors import RecipeError
from bagualu.parallel.balance.stages.activations import Activations
from bagualu.parallel.balance.stages.choose import choose_split, take_split
from bagualu.parallel.balance.stages.cost import CostTable
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.balance.stages.keys import COMPUTED, memory_caps
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.schedules.schedule import Schedule
from bagualu.parallel.pipeline.split import split_layers
from bagualu.trainer.costs.analytic import analytic_table
from bagualu.trainer.costs.predicted_split import keeps_to_caps, with_prediction, with_reserved
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.recipe.config import Recipe

_SEARCHES = 5
"""The number of splits that are searched for, each with the memory reserved that the one before was found to take."""


def needs_costs(recipe: Recipe) -> bool:
    """Returns whether the split depends on the costs of layers. balance=uniform and lists of layers need none, unless a limit of
    memory must be kept to (parallel.memory_bytes or train.recompute=bytes:N)."""
    limited = recipe.parallel.memory_bytes is not None or recipe.activations().most_bytes is not None
    return limited or recipe.parallel.balance in COMPUTED


def measures(recipe: Recipe) -> bool:
    """Returns whether a run measures the costs on which its split depends: with balance=measured, and to keep to a number of bytes
    of activations unless balance=analytic."""
    balance = recipe.parallel.balance
    return balance == "measured" or (recipe.activations().most_bytes is not None and balance != "analytic")


def plan_split(
    recipe: Recipe, layout: Layout, schedule: Schedule, micro_batches: int | None = None
) -> tuple[Split, CostTable | None]:
    """Returns the split that `parallel.balance` asks for, and the costs that were used for it (None if none were): analytic costs
    also in place of measured ones, and equal speeds in place of measured ones. `micro_batches` as in `predict`. Raises RecipeError
    if no split fits the limits."""
    if not needs_costs(recipe):
        layers, activations = recipe.model.layers, recipe.activations()
        slices = split_layers(layers, schedule.placement, recipe.parallel.balance)
        return Split(slices, [activations.of_layer(layer) for layer in range(layers)]), None
    table, speeds = analytic_table(work_of(recipe, layout)), recipe.parallel.speeds
    return split_by(recipe, layout, table, schedule, None if speeds == "measured" else speeds, micro_batches)


def split_by(
    recipe: Recipe,
    layout: Layout,
    table: CostTable,
    schedule: Schedule,
    speeds: Sequence[float] | None,
    micro_batches: int | None = None,
) -> tuple[Split, CostTable]:
    """Returns the split that `parallel.balance` asks for, and the table with what ranks take besides their layers, given the costs
    of layers and the speeds of pipeline ranks (None: equal speeds). `micro_batches` as in `predict`.

    `predict` decides whether a split fits parallel.memory_bytes. The search knows only of layers, so what a rank takes besides is
    reserved, and if the split that it finds takes more, it searches again. Raises RecipeError if no split fits the limits.
    """
    caps, activations = memory_caps(recipe.parallel.memory_bytes, schedule.placement.ranks), recipe.activations()
    computed = recipe.parallel.balance in COMPUTED
    slices = split_layers(recipe.model.layers, schedule.placement, "uniform" if computed else recipe.parallel.balance)
    if caps is not None:
        alike = [take_split(slices, table, schedule, None, one) for one in _extremes(activations, recipe.model.layers)]
        table = with_reserved(recipe, layout, table, schedule, alike, micro_batches)
    for _ in range(_SEARCHES):
        split = (
            choose_split(table, schedule, speeds, caps, activations)
            if computed
            else take_split(slices, table, schedule, caps, activations)
        )
        predicted = with_prediction(recipe, layout, split, schedule, micro_batches)
        if keeps_to_caps(recipe, predicted):
            return predicted, table
        table = with_reserved(recipe, layout, table, schedule, [split], micro_batches)
    assert caps is not None
    assert predicted.forecast is not None
    needs = predicted.forecast.memory_bytes
    rank = max(range(len(caps)), key=lambda rank: needs[rank] / caps[rank])
    raise RecipeError(f"pipeline rank {rank} needs {needs[rank]} bytes but parallel.memory_bytes allows {caps[rank]}; give "
                      f"parallel.memory_bytes={max(needs)}")  # fmt: skip


def _extremes(activations: Activations, layers: int) -> list[Activations]:
    """Returns `activations` without a limit or, if the layers that recompute are chosen, with none and with all of them chosen."""
    if activations.recompute is not None:
        return [replace(activations, most_bytes=None)]
    return [replace(activations, most_bytes=None, recompute=(part,) * layers) for part in ("none", "full")]
