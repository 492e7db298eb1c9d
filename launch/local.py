"""Run a recipe on this machine: as worker processes under torch.distributed.elastic, or as threads of this process."""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous_registry

from bagualu.comm import simulated
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.directory import latest
from bagualu.launch import member
from bagualu.launch.agent import Agent, Killed
from bagualu.trainer import environment
from bagualu.trainer.config import Recipe
from bagualu.trainer.outcome import Failure, first
from bagualu.trainer.stopping import StopRequest
from bagualu.trainer.worker import train


@dataclass(frozen=True)
class Ended:
    """A run's end on this machine: its summary, or the failure that began its end."""

    summary: dict[str, Any] | None = None
    failure: Failure | None = None


def run_processes(recipe: Recipe, workers: int, entrypoint: str, quiet_stdout: bool) -> Ended:
    """Train with `workers` processes here. The fork server is already on its way (forkserver.py)."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the last words are ours
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are the agent's
    with tempfile.TemporaryDirectory(prefix="bagualu-") as failures:
        told = member.Member(recipe, workers, entrypoint, failures, quiet_stdout)
        agent = Agent(_spec(recipe, workers, told))
        try:
            result = agent.run()
        except Killed:
            return Ended(failure=Failure(0, "train", "killed by a second Ctrl-C, nothing saved since the last checkpoint",
                                         time.time(), "killed"))  # fmt: skip
        if not result.is_failed():
            return Ended(summary=result.return_values[0])
        return Ended(failure=first([*member.read_failures(failures), *_deaths(agent, recipe)]))


def run_threads(recipe: Recipe, world: int, entrypoint: str, quiet_stdout: bool) -> Ended:
    """Train with `world` threads of this process (comm.backend=simulated)."""
    stop, failures = StopRequest(), list[Failure]()
    stop.install()

    def rank_main(communicator: Communicator) -> dict[str, Any]:
        return train(recipe, communicator, stop, failures.append, entrypoint)

    threads = environment.threads(recipe.launch, world)
    try:
        with contextlib.redirect_stdout(sys.stderr if quiet_stdout else sys.stdout):
            return Ended(summary=simulated.run(world, rank_main, recipe.comm.timeout_seconds, threads)[0])
    except Exception as error:
        traceback.print_exception(error)
        return Ended(failure=first(failures))


def advice(recipe: Recipe, failure: Failure) -> str:
    """What to do after a failure: where to look, how to go on."""
    log = Path(recipe.run.dir) / "logs" / f"rank-{failure.rank}.log"
    parts = [f"see {log}"] if log.exists() else []
    if latest(Path(recipe.run.dir) / "checkpoints"):
        parts.append("go on with checkpoint.resume=true")
    return ", ".join(parts) or f"give another run.dir or remove {recipe.run.dir}, and start again"


def _spec(recipe: Recipe, workers: int, told: member.Member) -> WorkerSpec:
    rendezvous = RendezvousParameters(
        backend="c10d",
        endpoint=f"127.0.0.1:{recipe.launch.port or 0}",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr="127.0.0.1",
        is_host=True,
    )
    return WorkerSpec(
        role="worker",
        local_world_size=workers,
        rdzv_handler=rendezvous_registry.get_rendezvous_handler(rendezvous),
        entrypoint=member.main,
        args=(told,),
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )


def _deaths(agent: Agent, recipe: Recipe) -> list[Failure]:
    """The workers that a signal ended."""
    metrics = Path(recipe.run.dir) / "metrics.jsonl"
    steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    phase = f"train (after step {steps})" if steps else "start"
    dead = [(rank, signal.Signals(-code).name) for rank, code in agent.exit_codes.items() if code < 0]
    hint = {"SIGKILL": " (out of memory, or by hand)"}
    return [Failure(rank, phase, f"killed by {name}{hint.get(name, '')}", time.time(), "killed") for rank, name in dead]
