"""Predicts what generated kernels save, by the costs of the operators that `train_step` executes with them and without."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import lcm
from typing import TypeVar

from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Chip
from bagualu.fault_tolerance.config import GuardConfig, RestartConfig
from bagualu.parallel.config import ParallelConfig
from bagualu.parallel.simulation.operator_cost import operator_seconds
from bagualu.trainer.recipe.changed import changed
from bagualu.trainer.recipe.config import LaunchConfig, Recipe, RunConfig
from bagualu.trainer.simulation.trace import Traced, trace

log = logging.getLogger(__name__)

T = TypeVar("T")


def seconds_saved(recipe: Recipe, chip: Chip, micro_batches: int) -> float:
    """Returns the seconds of a step of so many micro-batches that generated kernels save for a rank alone on a chip; 0 if the
    recipe cannot be traced."""

    def saved(part: Recipe) -> dict[str, float]:
        eager, generated = (_seconds(changed(part, {"train.compile": compiles}), chip) for compiles in (False, True))
        return {"saved": eager - generated}

    try:
        return over_layers(one_data_rank(recipe, ParallelConfig()), micro_batches, saved)["saved"]
    except RecipeError as error:
        log.debug("what generated kernels save is not known: %s", error)
        return 0.0


def one_data_rank(recipe: Recipe, parallel: ParallelConfig) -> Recipe:
    """Returns the recipe for another layout, with a micro-batch on each data rank, without what a trace cannot have, and without
    what depends on the number of ranks, on their memory or on the number of layers."""
    recipe = replace(recipe, run=RunConfig(), parallel=parallel, guard=GuardConfig(), restart=RestartConfig(),
                     launch=LaunchConfig(), model=replace(recipe.model, origin=None), cluster=None, faults=[])  # fmt: skip
    again = recipe.train.recompute
    return changed(recipe, {
        "data.global_batch": recipe.train.micro_batch * (parallel.data or 1),
        "train.recompute": again if again in ("full", "attention", "experts") else "none",
        "train.offload_bytes": 0,
        "optim.name": "adamw",
        "optim.groups": [],
    })  # fmt: skip


def over_layers(recipe: Recipe, micro_batches: int, find: Callable[[Recipe], Mapping[T, float]]) -> dict[T, float]:
    """Returns what `find` finds for the recipe with so many times its batch and all its layers, by what it finds for few: each
    micro-batch and each layer, or series of layers, adds as much as any other."""
    model, batch = recipe.model, recipe.data.global_batch
    series = lcm(model.moe.every if model.moe.experts else 1, model.full_attention_every or 1)

    def of_batch(part: Recipe) -> dict[T, float]:
        return _extended(lambda times: find(changed(part, {"data.global_batch": times * batch})), micro_batches)

    if model.layers <= 2 * series:
        return of_batch(recipe)
    return _extended(lambda times: of_batch(changed(recipe, {"model.layers": times * series})), model.layers / series)


def _extended(find: Callable[[int], Mapping[T, float]], times: float) -> dict[T, float]:
    """Returns find(times) of what grows evenly, by find(1) and find(2)."""
    one = find(1)
    if times == 1:
        return dict(one)
    two = find(2)
    return {key: one.get(key, 0.0) + (times - 1) * (two.get(key, 0.0) - one.get(key, 0.0)) for key in {**one, **two}}


def _seconds(recipe: Recipe, chip: Chip) -> float:
    return sum(operator_seconds(chip, operator) for operator in trace(recipe, 1, 0, Traced(chip=chip.type)).operators())
