"""`bagualu train`: check the recipe, start the workers here, say how it ended. Free of torch until workers must start."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bagualu.fault_tolerance.checkpoint.directory import latest
from bagualu.launch import forkserver
from bagualu.launch.sweep import jobs
from bagualu.launch.usage import Request
from bagualu.trainer import environment, preflight
from bagualu.trainer.config import Recipe
from bagualu.trainer.outcome import DONE, FAILED, REFUSED, STOPPED, Failure, last_words
from bagualu.trainer.recipe import compose, save_recipe

_TRAIN = "bagualu.trainer.run:train"
_ELASTIC = "torch.distributed.elastic.multiprocessing"


def train(request: Request, entrypoint: str | None) -> tuple[int, Any]:
    """Train, or run every job of a sweep until one does not finish; exit code and the document for --json."""
    todo = jobs(request.overrides) if request.multirun else [(request.overrides, compose(request.overrides))]
    for _, recipe in todo:
        preflight.workers_per_node(recipe)
        preflight.check(recipe, recipe.world_size())
        preflight.check_machine(recipe)
        preflight.check_run_directory(recipe)
    code, documents = DONE, []
    for overrides, recipe in todo:
        code, document = _run(recipe, overrides, entrypoint or _TRAIN, request.json)
        documents.append(document)
        if code != DONE:
            break
    return code, documents if request.multirun else documents[0]


def _run(recipe: Recipe, overrides: list[str], entrypoint: str, quiet_stdout: bool) -> tuple[int, dict[str, Any]]:
    workers = preflight.workers_per_node(recipe)
    recipe.faults = [str(fault) for fault in recipe.planned_faults(workers)]
    save_recipe(recipe)
    threaded = recipe.comm.backend == "simulated"
    kind = "threads of this process" if threaded else "processes"
    layout = recipe.validate(workers)
    print(f"{recipe.run.name}: {layout} as {workers} {kind}, in {recipe.run.dir}{_from(recipe)}", file=sys.stderr, flush=True)
    with _environment(environment.variables(recipe.launch, workers)):
        if not threaded:
            forkserver.start(["bagualu.launch.member", _ELASTIC, entrypoint.split(":")[0]])
        from bagualu.launch import local  # imports torch: here, while the fork server does too

        if threaded:
            ended = local.run_threads(recipe, workers, entrypoint, quiet_stdout)
        else:
            ended = local.run_processes(recipe, workers, entrypoint, quiet_stdout)
            forkserver.stop()
    if ended.failure is not None:
        return _failed(ended.failure, local.advice(recipe, ended.failure))
    assert ended.summary is not None
    if not quiet_stdout:
        from bagualu.trainer.progress import next_commands, summary_text

        following = next_commands(overrides, ended.summary["step"], ended.summary["steps"])
        print(summary_text(ended.summary, following))
    return STOPPED if ended.summary["ended"] == "stopped" else DONE, ended.summary


def _from(recipe: Recipe) -> str:
    """Where a run that was asked to resume begins."""
    if not recipe.checkpoint.resume:
        return ""
    newest = latest(Path(recipe.run.dir) / "checkpoints")
    return f", from {newest.name}" if newest else ", from the start: there is no checkpoint to resume from"


def _failed(failure: Failure, advice: str) -> tuple[int, dict[str, Any]]:
    if sys.stderr.isatty():
        print("\x1b[?25h", file=sys.stderr)  # off the line of a bar that was cut short, with the cursor it had hidden
    print(last_words(failure, advice), file=sys.stderr, flush=True)
    refused = failure.kind == "recipe"
    return REFUSED if refused else FAILED, {"ended": "refused" if refused else "failed", **failure.as_dict()}


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """The environment with `variables`, for the processes that start inside."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
