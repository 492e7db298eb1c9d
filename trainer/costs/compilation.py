"""Chooses whether kernels are generated, for train.compile=auto, before the workers start.

Generating them takes a while when a run begins, and each step is faster afterwards. So a run has to be long enough.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Chip, ShapeEfficiency
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.trainer.costs.work import cpu_multiplies
from bagualu.trainer.models.decoder.flops import model_flops_per_token
from bagualu.trainer.process.environment import threads
from bagualu.trainer.recipe.compose import load_recipe
from bagualu.trainer.recipe.config import CHOSEN, DTYPES, Recipe
from bagualu.trainer.user_settings import cpp_compiler

COMPILE_SECONDS = 30.0
"""The most that generating a model's kernels takes on two cores, if none is kept from a run before (docs/performance.md)."""
MOST_SAVED = 0.4
"""Estimate: the most that generated kernels save, as a fraction of the time of a step's products. For runs that are too short even
for that, nothing is predicted."""
_CORE_FLOPS = {True: 1.5e11, False: 4e10}
"""Estimate: FLOP/s of a core in a step, if it multiplies 16-bit matrices itself and does so, and if not."""
_CORE_BYTES = 2.4e10
"""Estimate: the bytes that a core reads and writes in a second in operators of few FLOPs, for the most part in its caches: kernels
then save as much of a step of bench_dense as was measured (docs/performance.md)."""
_CALL_SECONDS = 4e-6
"""Estimate: the fixed time of an operator."""

Saved = Callable[[Recipe, Chip, int], float]
"""Predicts the seconds that generated kernels save in a step of so many micro-batches, for a rank alone on a chip."""


def choose_compile(recipe: Recipe, workers: int, world: int, saved: Saved, before: bool | None = None) -> tuple[Recipe, str]:
    """Returns a recipe for `world` ranks, of which `workers` are on this machine, with train.compile=auto replaced by true or
    false, and a text that says so if it is not false as a matter of course. A run that resumes keeps what it began with, `before`.

    auto is true if generated kernels are expected to save at least twice the time that it takes to generate them, by what `saved`
    predicts, on CPUs, with a process for each rank: on GPUs they have not been measured. Without a C++ compiler it is false, and so
    is true.
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
    compiles = before if before is not None else _pays(recipe, workers, world, saved)
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


def _pays(recipe: Recipe, workers: int, world: int, saved: Saved) -> bool:
    """Returns whether a run on CPUs is long enough. Raises RecipeError if the recipe is wrong."""
    if not recipe.comm.on_cpu:
        return False
    layout, cores, dtype = recipe.validate(world), threads(recipe.launch, workers), recipe.train.stored_dtype
    rate = cores * _CORE_FLOPS[dtype == "bfloat16" and cpu_multiplies(dtype)]
    length, steps = recipe.data.sequence_length, recipe.train.steps
    products = recipe.data.global_batch * length * model_flops_per_token(recipe.model, length) / (world * rate)
    if steps * MOST_SAVED * products < 2 * COMPILE_SECONDS:
        return False
    micro_batches = max(1, recipe.micro_batches() // layout.data)
    of_rank = saved(recipe, _chip(rate, cores), micro_batches) / (layout.tensor * layout.pipeline)
    return steps * of_rank >= 2 * COMPILE_SECONDS


def _chip(rate: float, cores: int) -> Chip:
    """Returns a description of the cores of a rank, whose products reach `rate` FLOP/s."""
    whole = ShapeEfficiency(4096, 4096, 4096, 1.0)
    return Chip(
        name="CPU",
        vendor="",
        matmul_flops_per_second=dict.fromkeys(DTYPES, rate),
        memory_bytes=0,
        memory_bytes_per_second=cores * _CORE_BYTES,
        launch_seconds=_CALL_SECONDS,
        context_bytes=0,
        efficiency={"bfloat16": (whole,)},
        type="cpu",
    )


def _with(recipe: Recipe, compiles: bool) -> Recipe:
    return replace(recipe, train=replace(recipe.train, compile=compiles))
