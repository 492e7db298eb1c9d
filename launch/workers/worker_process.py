"""The main function of a worker process. It makes the worker end with its parent, redirects its output and records its failure."""

import contextlib
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.monitor import Monitor
from bagualu.comm.world import World
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.fault_tolerance.watchdog.heartbeat import HEARTBEATS, Heartbeat
from bagualu.fault_tolerance.watchdog.verdict import SPARE
from bagualu.launch.workers.worker_failures import write_failure
from bagualu.trainer.output.log_file import copy_to_log, redirect_to_log
from bagualu.trainer.process import environment
from bagualu.trainer.process.failure import FAILED
from bagualu.trainer.process.garbage_collection import leave_out_what_is_there
from bagualu.trainer.process.parent_death import die_with
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.process.worker import work
from bagualu.trainer.recipe.config import Recipe

_RELEASED = "released"
"""Name of a file in the scratch folder. When it exists, spare workers end and return the summary that it holds."""


@dataclass(frozen=True)
class WorkerArguments:
    """The arguments of every worker of this machine; the worker's rank comes from the environment."""

    recipe: Recipe
    slots: tuple[int, ...]
    """A number for each worker of this machine, by its local rank: the index of the GPU that the worker uses, if any."""
    training: int
    """The number of ranks that train; workers with this rank or a higher rank are spare."""
    entrypoint: str
    scratch: Path
    """The launch's folder in memory, shared by the workers of this machine (scratch.py)."""
    quiet_stdout: bool
    """Whether rank 0 writes only to stderr, because stdout is for the output of --json."""
    server: int = 0
    """Process id of the fork server."""


def main(arguments: WorkerArguments) -> dict[str, Any]:
    """Run one worker and return the run's summary; a spare worker returns that of the training ranks. A failure is written to the
    scratch folder and ends the process with exit code 1."""
    leave_out_what_is_there()  # the collector need not look at the modules from the fork server
    workers = len(arguments.slots)
    stop = StopRequest()
    stop.install()
    die_with(arguments.server)
    world = World.from_environment()
    log = RunDirectory(arguments.recipe.run.dir).log(world.rank)
    if world.rank:
        redirect_to_log(log)
    else:
        stop.tell.append(copy_to_log(log, arguments.quiet_stdout))
    config = arguments.recipe.launch
    if world.rank >= arguments.training:
        return _spare(arguments.scratch, world.rank)
    environment.pin(config, world.local_rank, workers)
    torch.set_num_threads(environment.threads(config, workers))
    world = replace(world, size=arguments.training, local_rank=arguments.slots[world.local_rank])
    try:
        return work(
            arguments.recipe,
            world,
            stop,
            lambda failure: write_failure(arguments.scratch, failure),
            arguments.entrypoint,
            arguments.scratch,
        )
    except BaseException:
        if world.rank:
            traceback.print_exc()
        else:
            with contextlib.suppress(OSError), log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(traceback.format_exc())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)


def _spare(scratch: Path, rank: int) -> dict[str, Any]:
    """Wait as a worker that the layout does not use until the training ranks have finished; returns their summary."""
    monitor = Monitor()
    monitor.point = SPARE
    Heartbeat(scratch / HEARTBEATS, rank, monitor)
    print("spare: the layout takes fewer ranks than there are workers", flush=True)
    while not (scratch / _RELEASED).exists():
        time.sleep(0.1)
    summary: dict[str, Any] = json.loads((scratch / _RELEASED).read_text())
    return summary


def release(scratch: Path, summary: dict[str, Any]) -> None:
    """Let the spare workers of this machine end and return `summary`."""
    unfinished = scratch / f"{_RELEASED}.new"
    unfinished.write_text(json.dumps(summary))
    unfinished.replace(scratch / _RELEASED)


def hold(scratch: Path) -> None:
    """Make the spare workers of the next generation on this machine wait until `release` is called."""
    (scratch / _RELEASED).unlink(missing_ok=True)
