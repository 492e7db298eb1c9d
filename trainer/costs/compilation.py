"""Chooses whether kernels are generated, for train.compile=auto, before the workers start.

Generating them takes a while when a run begins, and each step is faster afterwards. So a run has to be long enough.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.trainer.costs.work import cpu_multiplies
from bagualu.trainer.models.decoder.flops import model_flops_per_token
from bagualu.trainer.process.environment import threads
from bagualu.trainer.recipe.compose import load_recipe
from bagualu.trainer.recipe.config import CHOSEN, Recipe
from bagualu.trainer.user_settings import cpp_compiler

COMPILE_SECONDS = 30.0
"""The most that generating a model's kernels takes on two cores, if none is kept from a run before (docs/performance.md)."""
GAIN = 0.08
"""Estimate: the fraction of a step that generated kernels save (docs/performance.md)."""
_CORE_FLOPS = {True: 1.5e11, False: 4e10}
"""Estimate: FLOP/s of a core in a step, if it multiplies 16-bit matrices itself and does so, and if not."""


def choose_compile(recipe: Recipe, workers: int, world: int, before: bool | None = None) -> tuple[Recipe, str]:
    """Returns a recipe for `world` ranks, of which `workers` are on this machine, with train.compile=auto replaced by true or
    false, and a text that says so if it is not false as a matter of course. A run that resumes keeps what it began with, `before`.

    auto is true if generated kernels are expected to save at least twice the time that it takes to generate them, on CPUs, with a
    process for each rank: on GPUs they have not been measured. Without a C++ compiler it is false, and so is true.
    """
    given = recipe.train.compile
    if given is not True and given != CHOSEN:  # false, or what the check of the recipe refuses
        return recipe, ""
    if recipe.comm.backend == "simulated":
        return (_with(recipe, False), "") if given == CHOSEN else (recipe, "")
    if recipe.comm.on_cpu and cpp_compiler() is None:
        why = "train.compile=false from now on, since there is no C++ compiler (install g++, or name one in the variable CXX)"
        return _with(recipe, False), why if given is True or before else ""
    if given is True:
        return recipe, ""
    compiles = before if before is not None else _pays(recipe, workers, world)
    return _with(recipe, compiles), "train.compile=true (auto)" if compiles else ""


def compile_as_begun(recipe: Recipe) -> bool | None:
    """Returns whether the run began with generated kernels, if it resumes and that is to be chosen; else None. What keeps that from
    being read is reported later, by the check of the run directory."""
    directory = RunDirectory(Path(recipe.run.dir))
    with suppress(OSError, RecipeError):
        if recipe.train.compile == CHOSEN and recipe.checkpoint.resume and directory.has_begun():
            before = load_recipe(directory.config).train.compile
            return before if isinstance(before, bool) else None
    return None


def _pays(recipe: Recipe, workers: int, world: int) -> bool:
    """Returns whether a run on CPUs is long enough."""
    if not recipe.comm.on_cpu:
        return False
    length, dtype = recipe.data.sequence_length, recipe.train.dtype
    tokens = recipe.train.steps * recipe.data.global_batch * length
    rate = world * threads(recipe.launch, workers) * _CORE_FLOPS[dtype == "bfloat16" and cpu_multiplies(dtype)]
    return GAIN * tokens * model_flops_per_token(recipe.model, length) / rate >= 2 * COMPILE_SECONDS


def _with(recipe: Recipe, compiles: bool) -> Recipe:
    return replace(recipe, train=replace(recipe.train, compile=compiles))
