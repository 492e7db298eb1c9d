"""Chooses the size of micro-batches for train.micro_batch=auto, before the workers start.

A pass takes a time of its own besides that of its tokens: weights are read, gradients are added up, products with few rows use a
chip badly. So a larger micro-batch is faster, as long as it fits. A pipeline wants more than one, since its ranks wait while it
fills and empties. Of the sizes that divide the batch and fit, the one with the least predicted step is taken.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.parallel.balance.stages.activations import Activations
from bagualu.parallel.balance.stages.choose import take_split
from bagualu.trainer.costs.analytic import analytic_table
from bagualu.trainer.costs.fits import Device, fits, memory_schedule
from bagualu.trainer.costs.plan_split import plan_split
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.recipe.changed import changed
from bagualu.trainer.recipe.compose import load_recipe
from bagualu.trainer.recipe.config import CHOSEN, Recipe

_KEY = "train.micro_batch"
_USABLE = 0.8
"""The fraction of a device's memory that the choice counts on; the rest is for the system, communication libraries and what a
prediction leaves out."""
_PASS_TOKENS = 80.0
"""Estimate: the time that a pass takes besides that of its tokens, as the number of tokens that take as long. bench_dense trains
with 256 tokens in a pass at 0.89 of the speed that it has with 2,048 on two cores of an AMD EPYC, and at two thirds of it on two of
a Xeon with AMX: 40 and 160 tokens; this is their geometric mean. On the EPYC, zb_v over two ranks is quickest with 512."""


def choose_micro_batch(recipe: Recipe, world: int, device: Device | None, before: int | None = None) -> Recipe:
    """Returns a recipe for `world` ranks with train.micro_batch=auto replaced by a number of sequences; any other as it is. A run
    that resumes keeps the number with which it began, `before`, if that still divides its batch and fits.

    If the memory of `device` is not known, or no size fits, it is the smallest. Raises RecipeError if the rest of the recipe is
    wrong.
    """
    if recipe.train.micro_batch != CHOSEN:
        return recipe
    recipe.validate(world)  # as if the size were the smallest
    if recipe.parallel.shares == "measured":
        raise RecipeError("train.micro_batch=auto takes few micro-batches, and parallel.shares=measured needs many; give a number")
    if before is not None and _valid(_with(recipe, before), world) and fits(_with(recipe, before), world, device):
        return _with(recipe, before)
    if device is None:
        return _with(recipe, recipe.smallest_micro_batch())
    usable = replace(device, memory_bytes=int(device.memory_bytes * _USABLE))
    best, least = recipe.smallest_micro_batch(), None
    for size in _divisors(recipe.data.global_batch):
        sized = _with(recipe, size)
        if not (_valid(sized, world) and fits(sized, world, usable)):
            continue
        if recipe.parallel.pipeline == 1:
            return sized  # smaller ones are slower
        seconds = _step_seconds(sized, world)
        if least is None or seconds < least:
            best, least = size, seconds
    return _with(recipe, best)


def size_as_begun(recipe: Recipe) -> int | None:
    """Returns the size with which the run began, if it resumes and the size is to be chosen; else None. What keeps that from being
    read is reported later, by the check of the run directory."""
    directory = RunDirectory(Path(recipe.run.dir))
    with suppress(OSError, RecipeError):
        if recipe.train.micro_batch == CHOSEN and recipe.checkpoint.resume and directory.has_begun():
            before = load_recipe(directory.config).train.micro_batch
            return before if isinstance(before, int) else None
    return None


def _step_seconds(recipe: Recipe, world: int) -> float:
    """Returns the predicted time of a step in units that depend only on the model and the device."""
    layout = recipe.validate(world)
    work = work_of(recipe, layout)
    schedule, micro_batches = memory_schedule(recipe, layout)
    split, _ = plan_split(recipe, layout, schedule, micro_batches)
    forecast = take_split(split.slices, analytic_table(work), schedule, None, Activations(tuple(split.recompute))).forecast
    assert forecast is not None
    further = micro_batches - schedule.micro_batches  # in the steady part of the schedule
    return (forecast.step_seconds + further * forecast.bottleneck_seconds) * (1 + _PASS_TOKENS / work.tokens)


def _divisors(number: int) -> list[int]:
    """Returns the divisors of `number`, the largest first."""
    small = [divisor for divisor in range(1, int(number**0.5) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)}, reverse=True)


def _with(recipe: Recipe, size: int) -> Recipe:
    return changed(recipe, {_KEY: size})


def _valid(recipe: Recipe, world: int) -> bool:
    with suppress(RecipeError):
        recipe.validate(world)
        return True
    return False
