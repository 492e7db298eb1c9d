"""`bagualu train`: checks the recipe, prints what will run, and runs it. Torch is imported only when workers
start, or once the recipe of a long run has been checked, to predict whether kernels pay."""

import sys
from pathlib import Path
from typing import Any

from bagualu.fault_tolerance import run_lock
from bagualu.launch.verbs.command_line import SEVERAL, CommandLine
from bagualu.launch.verbs.series import Series
from bagualu.launch.verbs.sweep import jobs
from bagualu.launch.workers import storage_probe
from bagualu.launch.workers.run import run
from bagualu.trainer.costs.fits import check_memory, device_of
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.compose import compose, require_resumed_run
from bagualu.trainer.recipe.config import Recipe


def train(request: CommandLine, entrypoint: str | None) -> tuple[int, Any]:
    """Train, or with -m run every job of a sweep. Returns the exit code and the object that --json prints. Raises RecipeError."""
    stop = StopRequest()

    def train_once(recipe: Recipe) -> tuple[int, dict[str, Any]]:
        workers = preflight.workers_per_node(recipe)
        recipe, chosen = storage_probe.settle(recipe, workers)
        with run_lock.hold(Path(recipe.run.dir)):
            print(_beginning(recipe, workers, chosen), file=sys.stderr, flush=True)
            return run(recipe, workers, entrypoint, request.json, stop)

    if not request.multirun:
        require_resumed_run(request.overrides)
        recipe = compose(request.overrides, SEVERAL[request.verb])
        _check(recipe)
        storage_probe.check(recipe)
        return train_once(recipe)
    series = Series(jobs(request.overrides), stop)
    for job in series.jobs:  # all recipes are checked before the first job runs
        _check(job.recipe)
    return series.run(train_once)


def _check(recipe: Recipe) -> None:
    workers = preflight.workers_per_node(recipe)
    recipe, _ = storage_probe.settle(recipe, workers, predicts=False)
    preflight.check(recipe, recipe.world_size())
    preflight.check_machine(recipe)
    check_memory(recipe, recipe.world_size(), device_of(recipe, workers))


def _beginning(recipe: Recipe, workers: int, chosen: str) -> str:
    """Returns the first line that a run prints: its layout, engine, workers, what was `chosen` for this machine, its directory, and
    for a run that resumes the checkpoint that it resumes from."""
    kinds = ("thread", "threads of this process") if recipe.comm.backend == "simulated" else ("process", "processes")
    kind = kinds[workers > 1]
    start = ""
    if recipe.checkpoint.resume:
        checkpoint = storage_probe.newest(recipe)
        start = f", from {checkpoint}" if checkpoint else ", from the start: there is no checkpoint to resume from"
    layout = f"{recipe.validate(workers)} ({recipe.parallel.engine_text})"
    return f"{recipe.run.name}: {layout} as {workers} {kind} with {chosen}, in {recipe.run.dir}{start}"
