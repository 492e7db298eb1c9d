"""Runs a recipe as threads of this process, for comm.backend=simulated."""

import atexit
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagualu.comm import simulated
from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.comm.virtual_clock import VirtualClock
from bagualu.fault_tolerance.injection.fault import ProcessKilled
from bagualu.fault_tolerance.watchdog.heartbeat import HEARTBEATS, Heartbeat
from bagualu.launch.watch.watcher import Watcher
from bagualu.launch.workers.ended import Ended, killed, not_begun
from bagualu.launch.workers.restart_policy import Restarts, announcement, resuming
from bagualu.launch.workers.storage_probe import begun
from bagualu.trainer.process import environment
from bagualu.trainer.process.failure import FAILED, Failure, at_fault, first
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.process.worker import train
from bagualu.trainer.recipe.config import Recipe


def run_threads(
    recipe: Recipe,
    world: int,
    entrypoint: str,
    quiet_stdout: bool,
    folder: Path,
    stop: StopRequest,
    watchers: Sequence[Watcher] = (),
) -> Ended:
    """Train with `world` threads of this process (comm.backend=simulated), with restarts, and return how the run ended.

    `folder` and `stop` are those of `run_processes`.
    """
    restarts, generation = Restarts(recipe.restart), 0
    if stop():
        return not_begun()
    with contextlib.redirect_stdout(sys.stderr if quiet_stdout else sys.stdout):
        while True:
            for watcher in watchers:
                watcher.started(generation, dict.fromkeys(range(world), os.getpid()))
            try:
                ended = _run_threads_once(resuming(recipe) if generation else recipe, world, entrypoint, stop, folder, watchers)
                if ended.failure is None:
                    return ended
                decision = restarts.decide(ended.failure)
                again = decision.again and not stop()
                for watcher in watchers:
                    watcher.failed(generation, decision.failure, again)
                if again:
                    print(f"bagualu: {announcement(decision, restarts, recipe, begun(folder))}", file=sys.stderr, flush=True)
                    _pause(decision.pause_seconds, stop)
                if not again or stop():
                    return Ended(failure=decision.failure)
            except KeyboardInterrupt:
                atexit.register(_leave_threads)
                return killed()
            generation += 1


def _pause(seconds: float, stop: StopRequest) -> None:
    """Waits, but no longer than until the process is asked to stop."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not stop():
        time.sleep(0.05)


def _leave_threads() -> None:
    """End the process while rank threads still run. A normal exit of the interpreter would crash with running threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILED)


def _run_threads_once(
    recipe: Recipe, world: int, entrypoint: str, stop: StopRequest, folder: Path, watchers: Sequence[Watcher]
) -> Ended:
    failures: list[Failure] = []

    def rank_main(communicator: Communicator) -> dict[str, Any]:
        Heartbeat(folder / HEARTBEATS, communicator.rank, communicator.monitor)
        return train(recipe, communicator, stop, failures.append, entrypoint, folder)

    seen: list[Failure] = []

    def hung() -> str | None:
        seen.extend(failure for watcher in watchers if (failure := watcher.look()))
        return seen[0].cause if seen else None

    threads = environment.threads(recipe.launch, world)
    clock = VirtualClock(world, load_cluster(recipe.cluster)) if recipe.cluster else None
    try:
        summaries = simulated.run(world, rank_main, recipe.comm.timeout_seconds, threads, hung, recipe.comm.device, clock)
        return Ended(summary=summaries[0])
    except (Exception, ProcessKilled) as error:
        if not isinstance(error, RecipeError):  # its message says everything; no traceback is needed
            traceback.print_exception(error)
        return Ended(failure=seen[0] if seen else at_fault(first(failures), not recipe.restart.hang_seconds))
