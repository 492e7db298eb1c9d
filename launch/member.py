"""A local worker process, from its fork to its end: whom it dies with, where its output goes, what it tells of a failure."""

import ctypes
import json
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.world import World
from bagualu.trainer import environment
from bagualu.trainer.config import Recipe
from bagualu.trainer.log import copy_to_log, redirect_to_log
from bagualu.trainer.outcome import FAILED, Failure
from bagualu.trainer.stopping import StopRequest
from bagualu.trainer.worker import work

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Member:
    """What every local worker is told, besides who it is."""

    recipe: Recipe
    workers: int
    entrypoint: str
    failures: str
    """Folder for failures, one file for each rank that has one."""
    quiet_stdout: bool
    """Rank 0 writes to stderr only, because stdout is for one JSON document."""


def main(member: Member) -> dict[str, Any]:
    """Run one worker; its summary. A failure is written down and ends the process at once, with code 1."""
    stop = StopRequest()
    stop.install()
    _die_with_launcher()
    world = World.from_environment()
    log = Path(member.recipe.run.dir) / "logs" / f"rank-{world.rank}.log"
    if world.rank:
        redirect_to_log(log)
    else:
        copy_to_log(log, member.quiet_stdout)
    config = member.recipe.launch
    environment.pin(config, world.local_rank, member.workers)
    torch.set_num_threads(environment.threads(config, member.workers))
    try:
        return work(member.recipe, world, stop, lambda failure: write_failure(member.failures, failure), member.entrypoint)
    except BaseException:
        if world.rank:
            traceback.print_exc()
        else:
            log.open("a").write(traceback.format_exc())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)


def write_failure(folder: str, failure: Failure) -> None:
    path = Path(folder) / f"{failure.rank}.json"
    path.with_suffix(".new").write_text(json.dumps(failure.as_dict()))
    path.with_suffix(".new").replace(path)


def read_failures(folder: str) -> list[Failure]:
    return [Failure(**json.loads(path.read_text())) for path in sorted(Path(folder).glob("*.json"))]


def _die_with_launcher() -> None:
    """Never outlive the launcher, however it ends; nor the fork server, through which the launcher sees this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()
