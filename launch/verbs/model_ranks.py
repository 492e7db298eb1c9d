"""Runs the ranks of a verb that uses a trained model: checks their layout, starts them, and reports a failure."""

import sys
from typing import Any

from bagualu.comm.config import AUTO
from bagualu.launch.workers.ended import Ended
from bagualu.launch.workers.run import call_on_threads, call_on_workers
from bagualu.trainer.process.failure import Failure, last_line
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.choose_backend import gpu_count, torch_has_cuda
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.settle import settle


def on_this_machine(recipe: Recipe) -> Recipe:
    """Returns the recipe, checked, with the backend that this machine has: a single rank is a thread of this process. Raises
    RecipeError."""
    workers = preflight.workers_per_node(recipe)
    if recipe.comm.backend == AUTO and workers == 1:
        recipe.comm.backend = "simulated"
        recipe.comm.device = "cuda" if gpu_count() and torch_has_cuda() else recipe.comm.device
    recipe, _ = settle(recipe, workers, workers)
    preflight.check(recipe, workers)
    preflight.check_machine(recipe)
    return recipe


def call(recipe: Recipe, entrypoint: str, quiet_stdout: bool) -> Ended:
    """Calls `entrypoint` on the ranks of the recipe; returns what the first returned, as the summary, or why it failed."""
    stop = StopRequest()
    stop.tell = []  # nothing is saved
    start = call_on_threads if recipe.comm.backend == "simulated" else call_on_workers
    return start(recipe, recipe.world_size(), entrypoint, stop, quiet_stdout)


def report_failure(failure: Failure) -> tuple[int, dict[str, Any]]:
    """Prints a failure as one line; returns the exit code and the object that --json prints."""
    print(last_line(failure, "nothing was written"), file=sys.stderr, flush=True)
    how = {"recipe": "refused", "stopped": "interrupted"}.get(failure.kind, "failed")
    return failure.exit_code, {"ended": how, "error": failure.cause, **failure.as_dict()}
