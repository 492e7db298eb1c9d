"""Divides the layers of a model over pipeline stages so that they fit devices on which equal stages do not.

On a mixed cluster, ranks with less memory get fewer layers. On any cluster the first ranks of a pipeline hold more micro-batches
than the last ones, and the first and the last hold the embedding and the head besides.
"""

from collections.abc import Sequence
from dataclasses import replace

from bagualu.parallel.balance.stages.choose import take_split
from bagualu.parallel.balance.stages.cost import CostTable, LayerCost
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.balance.stages.partition import GaveUp, solve
from bagualu.parallel.balance.stages.problem import Problem
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.schedules.schedule import Schedule
from bagualu.parallel.pipeline.split import split_layers
from bagualu.parallel.planner.layouts import evened
from bagualu.trainer.costs.analytic import analytic_table
from bagualu.trainer.costs.fits import memory_schedule
from bagualu.trainer.costs.predicted_split import with_reserved
from bagualu.trainer.costs.prediction import predict
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.recipe.config import Recipe

_SEARCHES = 3
"""The number of splits that are searched for, each with the memory reserved that the one before was found to take."""
_SECONDS = ("forward_seconds", "input_gradient_seconds", "weight_gradient_seconds")
_WORK = 20_000
"""The choices that each search may examine (partition.py), a tenth of those at the start of a run."""


def fitting_split(
    recipe: Recipe, layout: Layout, times: CostTable, speeds: Sequence[float], limits: Sequence[int]
) -> tuple[float, ...] | None:
    """Returns numbers of layers per stage with which the predicted memory of each pipeline rank is within its limit, in bytes, and
    the slowest rank is fast; None if a short search finds none.

    `times`: the seconds of each layer without recomputation, on a device of speed 1.0; its bytes are not used. `speeds`: of the
    devices of each pipeline rank.
    """
    schedule, micro_batches = memory_schedule(recipe, layout)
    table, activations = _with_times(analytic_table(work_of(recipe, layout)), times), recipe.activations()
    split = take_split(split_layers(recipe.model.layers, schedule.placement, "uniform"), table, schedule, None, activations)
    for _ in range(_SEARCHES):
        table = with_reserved(recipe, layout, table, schedule, [split], micro_batches)
        problem = Problem(table, schedule, speeds, limits, activations)
        try:
            solution = solve(problem, _WORK)
        except GaveUp:
            return None
        if solution is None:
            return None
        found = tuple(problem.slice_of(piece).count for piece in solution.pieces)
        for counts in (evened(found, schedule.placement), found):
            slices = split_layers(recipe.model.layers, schedule.placement, list(counts))
            split = take_split(slices, table, schedule, None, activations)
            if _fits(recipe, layout, split, schedule, micro_batches, limits):
                return counts
    return None


def _with_times(table: CostTable, times: CostTable) -> CostTable:
    """Returns `table` with the seconds of `times`. What the halves of a layer take of it stays in proportion."""

    def timed(one: LayerCost, other: LayerCost) -> LayerCost:
        seconds = {name: getattr(other, name) for name in _SECONDS}
        halves = []
        for half in one.halves:
            shares = {name: getattr(half, name) / (getattr(one, name) or 1.0) for name in _SECONDS}
            halves.append(replace(half, **{name: shares[name] * seconds[name] for name in _SECONDS}))
        return replace(one, **seconds, halves=tuple(halves))

    layers = [timed(*pair) for pair in zip(table.layers, times.layers, strict=True)]
    return replace(table, embedding=timed(table.embedding, times.embedding), layers=layers, head=timed(table.head, times.head))


def _fits(recipe: Recipe, layout: Layout, split: Split, schedule: Schedule, micro_batches: int, limits: Sequence[int]) -> bool:
    needs = [sum(memory.values()) for memory in predict(recipe, layout, split, schedule, micro_batches)]
    return all(need <= limit for need, limit in zip(needs, limits, strict=True))
