"""Runs a checked recipe on this machine and returns its exit code. Torch is imported only when workers start."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance import run_lock
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.launch.watch.hang import HangCheck
from bagualu.launch.watch.ledger import LedgerWatcher
from bagualu.launch.watch.summary import SummaryWatcher
from bagualu.launch.workers import fork_server, storage_probe
from bagualu.launch.workers.ended import Ended
from bagualu.launch.workers.rendezvous_config import Meeting
from bagualu.launch.workers.scratch import scratch
from bagualu.trainer.process import environment
from bagualu.trainer.process.failure import DONE, STOPPED, Failure, last_line, what_next
from bagualu.trainer.process.garbage_collection import uncollected
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe.config import Recipe

_ELASTIC = "torch.distributed.elastic.multiprocessing"
_COMPILER = "torch._dynamo"
"""Module that recomputation imports. Importing it once in the fork server saves each worker a second."""


def run(
    recipe: Recipe,
    workers: int,
    entrypoint: str | None,
    quiet_stdout: bool,
    stop: StopRequest,
    meeting: Meeting | None = None,
) -> tuple[int, dict[str, Any]]:
    """Train with `workers` workers on this machine, alone or with the other nodes of `meeting`.

    Args:
        entrypoint: the function that ranks run, as "module:function"; None: the trainer.
        quiet_stdout: whether stdout is kept free for the output of --json.
        stop: the request to stop. Its signal handlers are installed and stay installed. A caller with several runs passes the same
            object to each run, and a run does not begin after a request to stop.

    Returns the exit code and the object that --json prints.
    """
    entrypoint = entrypoint or environment.TRAIN
    threaded = recipe.comm.backend == "simulated"
    ledger = LedgerWatcher(Path(recipe.run.dir))
    summary = SummaryWatcher(recipe)
    stop.tell = [2] if threaded else []  # worker processes acknowledge a request to stop themselves
    stop.install()

    with summary.crashing(), scratch() as folder, _environment(environment.variables(recipe.launch, workers)):
        if meeting is None:  # with several nodes, the one that holds the lock calls it
            summary.begins()
        if not threaded:
            needed = ["bagualu.launch.workers.worker_process", _ELASTIC, entrypoint.split(":")[0]]
            fork_server.start([*needed, _COMPILER] if recipe.train.recompute != "none" else needed, folder)
        with uncollected():
            from bagualu.launch.workers import processes, threads  # they import torch, while the fork server does the same

        watchers = [ledger, summary, HangCheck(recipe, folder)]
        if threaded:
            ended = threads.run_threads(recipe, workers, entrypoint, quiet_stdout, folder, stop, watchers)
        else:
            ended = processes.run_processes(recipe, workers, entrypoint, quiet_stdout, folder, stop, meeting, watchers)
            stop.install()  # the agent had replaced the signal handlers
            fork_server.stop()
        begun = storage_probe.begun(folder)
        summary.ended(ended.summary, ended.failure)
    stop.tell = []
    if ended.failure is not None:
        return _failed(ended.failure, recipe, begun)
    assert ended.summary is not None
    if ended.prints_summary and not quiet_stdout:
        from bagualu.trainer.output.progress import next_commands, summary_text

        typed = "bagualu" if shutil.which("bagualu") else sys.argv[0]  # not on the PATH if the environment is not activated
        done, steps, text = ended.summary["step"], ended.summary["steps"], bool(ended.summary.get("text"))
        following = [] if meeting else next_commands(recipe.run.dir, recipe.optim, done, steps, text, typed)
        print(summary_text(ended.summary, following))
    return STOPPED if ended.summary["ended"] == "stopped" else DONE, ended.summary


def call_on_workers(recipe: Recipe, workers: int, entrypoint: str, stop: StopRequest, quiet_stdout: bool = True) -> Ended:
    """Starts `workers` workers on this machine as a run of the recipe does, with its threads, cores and allocator, and calls
    `entrypoint` on each in place of the trainer. Returns what the first returned, as the summary, or why it failed. Nothing is
    written to run.dir but logs, and with `quiet_stdout` nothing to stdout."""
    stop.install()
    with scratch() as folder, _environment(environment.variables(recipe.launch, workers)):
        fork_server.start(["bagualu.launch.workers.worker_process", _ELASTIC, entrypoint.split(":")[0]], folder)
        with uncollected():
            from bagualu.launch.workers import processes  # it imports torch, while the fork server does the same

        ended = processes.run_processes(recipe, workers, entrypoint, quiet_stdout, folder, stop)
        stop.install()  # the agent had replaced the signal handlers
        fork_server.stop()
    return ended


def call_on_threads(recipe: Recipe, ranks: int, entrypoint: str, stop: StopRequest, quiet_stdout: bool) -> Ended:
    """Does what `call_on_workers` does on `ranks` ranks that are threads of this process."""
    stop.install()
    with scratch() as folder:
        with uncollected():
            from bagualu.launch.workers import threads  # it imports torch

        return threads.run_threads(recipe, ranks, entrypoint, quiet_stdout, folder, stop)


def tell_refusal(recipe: Recipe, workers: int, error: RecipeError, stop: StopRequest, meeting: Meeting) -> None:
    """Tell the other nodes of `meeting`, which wait for this node, that it cannot join them because of `error`."""
    stop.install()
    with _environment(environment.variables(recipe.launch, workers)):
        from bagualu.launch.workers import ended, processes  # they import torch

        processes.tell_early(recipe, meeting, ended.refused(error), stop)


def _failed(failure: Failure, recipe: Recipe, begun: bool) -> tuple[int, dict[str, Any]]:
    if sys.stderr.isatty():
        print("\x1b[?25h", file=sys.stderr)  # leave the line of an interrupted progress bar, and show the cursor that it had hidden
    print(last_line(failure, _advice(recipe, failure, begun)), file=sys.stderr, flush=True)
    ended = {"recipe": "refused", "stopped": "stopped"}.get(failure.kind, "failed")
    refusal = {"error": failure.cause} if ended == "refused" else {}
    return failure.exit_code, {"ended": ended, **failure.as_dict(), **refusal}


def _advice(recipe: Recipe, failure: Failure, begun: bool) -> str:
    """Returns what the user can do after a failure: which log to read, how to resume. `begun`: whether this launch has opened the
    run's checkpoints."""
    log = RunDirectory(recipe.run.dir).log(failure.rank)
    parts = [f"see {log}"] if log.exists() else []
    if storage_probe.newest(recipe, begun):
        parts.append(what_next(failure))
    elif failure.kind == "stopped":
        return "nothing was done yet, so nothing is lost: start again with checkpoint.resume=true"
    elif failure.kind == "storage":  # no checkpoint is visible, but the storage may not be answering
        parts.append("go on with checkpoint.resume=true when its storage answers")
    return ", ".join(parts) or _start_again(Path(recipe.run.dir))


def _start_again(directory: Path) -> str:
    """Returns the advice for a failed run without a checkpoint. It never suggests removing a directory that another job may be
    using."""
    if run_lock.may_be_in_use(directory):
        return "give another run.dir and start again"
    return f"give another run.dir or remove {directory}, and start again"


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets `variables` in the environment, for the processes that start inside this context; restores it afterwards."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
