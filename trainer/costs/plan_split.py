"""Splits a recipe's layers over stages without measuring anything."""

from collections.abc import Sequence

from bagualu.parallel.balance.stages.choose import choose_split, take_split
from bagualu.parallel.balance.stages.cost import CostTable
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.balance.stages.keys import COMPUTED, memory_caps
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.schedules.schedule import Schedule
from bagualu.parallel.pipeline.split import split_layers
from bagualu.trainer.costs.analytic import analytic_table
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.recipe.config import Recipe


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


def plan_split(recipe: Recipe, layout: Layout, schedule: Schedule) -> tuple[Split, CostTable | None]:
    """Returns the split that `parallel.balance` asks for, and the costs that were used for it (None if none were): analytic costs
    also in place of measured ones, and equal speeds in place of measured ones. Raises RecipeError if no split fits the limits."""
    if not needs_costs(recipe):
        layers, activations = recipe.model.layers, recipe.activations()
        slices = split_layers(layers, schedule.placement, recipe.parallel.balance)
        return Split(slices, [activations.of_layer(layer) for layer in range(layers)]), None
    table, speeds = analytic_table(work_of(recipe, layout)), recipe.parallel.speeds
    return split_by(recipe, table, schedule, None if speeds == "measured" else speeds), table


def split_by(recipe: Recipe, table: CostTable, schedule: Schedule, speeds: Sequence[float] | None) -> Split:
    """Returns the split that `parallel.balance` asks for, given the costs of layers and the speeds of pipeline ranks (None: equal
    speeds). Raises RecipeError if no split fits the limits."""
    caps, activations = memory_caps(recipe.parallel.memory_bytes, schedule.placement.ranks), recipe.activations()
    if recipe.parallel.balance in COMPUTED:
        return choose_split(table, schedule, speeds, caps, activations)
    slices = split_layers(recipe.model.layers, schedule.placement, recipe.parallel.balance)
    return take_split(slices, table, schedule, caps, activations)
