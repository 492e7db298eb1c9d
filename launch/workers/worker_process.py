"""A local worker process, from its fork to its end: whom it dies with, where its output goes, what it tells of a failure."""

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
"""File of the scratch folder: spare workers may end."""


@dataclass(frozen=True)
class Member:
    """What every local worker is told, besides who it is."""

    recipe: Recipe
    slots: tuple[int, ...]
    """Places for workers on this machine, one each: a GPU, or just a number."""
    training: int
    """Ranks that train; those from there on are spare."""
    entrypoint: str
    scratch: Path
    """The launch's folder in memory, shared by the workers of this machine; see scratch.py."""
    quiet_stdout: bool
    """Rank 0 writes to stderr only, because stdout is for one JSON document."""
    server: int = 0
    """The process that workers are forked from."""


def main(member: Member) -> dict[str, Any]:
    """Run one worker; its summary. A failure is written down and ends the process at once, with code 1."""
    leave_out_what_is_there()  # it had all its modules from the fork server
    workers = len(member.slots)
    stop = StopRequest()
    stop.install()
    die_with(member.server)
    world = World.from_environment()
    log = Path(member.recipe.run.dir) / "logs" / f"rank-{world.rank}.log"
    if world.rank:
        redirect_to_log(log)
    else:
        stop.tell.append(copy_to_log(log, member.quiet_stdout))
    config = member.recipe.launch
    if world.rank >= member.training:
        return _spare(member.scratch, world.rank)
    environment.pin(config, world.local_rank, workers)
    torch.set_num_threads(environment.threads(config, workers))
    world = replace(world, size=member.training, local_rank=member.slots[world.local_rank])
    try:
        return work(
            member.recipe, world, stop, lambda failure: write_failure(member.scratch, failure), member.entrypoint, member.scratch
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
    """A worker that the layout has no use for waits for those that train, and returns their summary."""
    monitor = Monitor()
    monitor.point = SPARE
    Heartbeat(scratch / HEARTBEATS, rank, monitor)
    print("spare: the layout takes fewer ranks than there are workers", flush=True)
    while not (scratch / _RELEASED).exists():
        time.sleep(0.1)
    summary: dict[str, Any] = json.loads((scratch / _RELEASED).read_text())
    return summary


def release(scratch: Path, summary: dict[str, Any]) -> None:
    """End the spare workers of this machine."""
    unfinished = scratch / f"{_RELEASED}.new"
    unfinished.write_text(json.dumps(summary))
    unfinished.replace(scratch / _RELEASED)


def hold(scratch: Path) -> None:
    """From now on spare workers wait."""
    (scratch / _RELEASED).unlink(missing_ok=True)
