"""Predicts what generated kernels save, by the costs of the operators that `train_step` executes with them and without."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import lcm
from typing import TypeVar

from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Chip
from bagualu.fault_tolerance.config import GuardConfig
from bagualu.parallel.config import ParallelConfig
from bagualu.parallel.simulation.operator_cost import operator_seconds
from bagualu.trainer.recipe.changed import changed
from bagualu.trainer.recipe.config import Recipe, RunConfig
from bagualu.trainer.simulation.trace import Traced, trace

T = TypeVar("T")


def gain_alone(recipe: Recipe, chip: Chip) -> float:
    """Returns the part of a step that generated kernels save on a chip for a rank alone, with one micro-batch in a step; 0 if that
    cannot be traced."""

    def seconds(recipe: Recipe) -> dict[bool, float]:
        return {compiles: _seconds(changed(recipe, {"train.compile": compiles}), chip) for compiles in (False, True)}

    try:
        found = over_layers(one_micro_batch(recipe, ParallelConfig()), seconds)
    except RecipeError:
        return 0.0
    return 1 - found[True] / found[False]


def one_micro_batch(recipe: Recipe, parallel: ParallelConfig) -> Recipe:
    """Returns the recipe for another layout with a micro-batch on each data rank, without what a trace cannot have, and without
    what depends on the layout's memory or on the number of layers."""
    recipe = replace(recipe, run=RunConfig(), parallel=parallel, guard=GuardConfig(), model=replace(recipe.model, origin=None))
    again = recipe.train.recompute
    return changed(recipe, {
        "data.global_batch": recipe.train.micro_batch * (parallel.data or 1),
        "train.recompute": again if again in ("full", "attention", "experts") else "none",
        "train.offload_bytes": 0,
        "optim.name": "adamw",
        "optim.groups": [],
    })  # fmt: skip


def over_layers(recipe: Recipe, find: Callable[[Recipe], Mapping[T, float]]) -> dict[T, float]:
    """Returns what `find` finds for the recipe; for a model of many layers by what it finds for models of few, each layer or series
    of layers adding as much as any other."""
    model = recipe.model
    series = lcm(model.moe.every if model.moe.experts else 1, model.full_attention_every or 1)
    if model.layers <= 2 * series:
        return dict(find(recipe))
    few, more = (find(changed(recipe, {"model.layers": layers})) for layers in (series, 2 * series))
    further = model.layers / series - 1
    return {key: few.get(key, 0.0) + further * (more.get(key, 0.0) - few.get(key, 0.0)) for key in {**few, **more}}


def _seconds(recipe: Recipe, chip: Chip) -> float:
    return sum(operator_seconds(chip, operator) for operator in trace(recipe, 1, 0, Traced(chip=chip.type)).operators())
