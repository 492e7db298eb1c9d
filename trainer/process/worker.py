"""Runs a rank: connects, trains and disconnects. The code is the same for `bagualu train`, `bagualu slurm` and torchrun; `train`
also runs a rank in a thread."""

import pkgutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bagualu.comm.group import Communicator, connect
from bagualu.comm.monitor import Monitor
from bagualu.comm.world import World
from bagualu.fault_tolerance.injection.fault import ProcessKilled
from bagualu.fault_tolerance.watchdog import stacks
from bagualu.fault_tolerance.watchdog.heartbeat import HEARTBEATS, Heartbeat
from bagualu.fault_tolerance.watchdog.verdict import Patience, missed_by
from bagualu.fault_tolerance.watchdog.watch import seen_now
from bagualu.trainer.process.environment import TRAIN
from bagualu.trainer.process.failure import Failure, failure
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe.config import Recipe

_LONG = 0.5
"""A rank is blamed for another rank's lost connection only if it showed no change for this fraction of comm.timeout_seconds."""
Report = Callable[[Failure], None]
"""A function that is called with the reason why a rank cannot continue, before the exception propagates."""


def work(
    recipe: Recipe, world: World, stop: StopRequest, report: Report, entrypoint: str = TRAIN, scratch: Path | None = None
) -> dict[str, Any]:
    """Joins the world and trains; returns the run's summary. `scratch` as in `trainer.run.train`.

    Installs the handlers of `stop` after joining; before that there is nothing to save. Only workers of our launcher have installed
    them earlier. A rank that fails calls `report`, raises, and does not close its connection: closing could wait for peers that are
    gone, and the other ranks notice the end of its process sooner.
    """
    monitor = Monitor()
    if scratch is not None:
        Heartbeat(scratch / HEARTBEATS, world.rank, monitor)
        stacks.show_on_signal(scratch / HEARTBEATS, world.rank)
    try:
        communicator = connect(recipe.comm.backend, world, recipe.comm.timeout_seconds, monitor)
    except Exception as error:
        report(failure(world.rank, "connect", error, time.time()))
        raise
    stop.install()
    summary = train(recipe, communicator, stop, report, entrypoint, scratch)
    communicator.close()
    return summary


def train(
    recipe: Recipe,
    communicator: Communicator,
    stop: Callable[[], bool],
    report: Report,
    entrypoint: str = TRAIN,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Runs `entrypoint` on a connected rank; returns the run's summary. If it fails, calls `report` and raises the error again."""
    try:
        summary: dict[str, Any] = pkgutil.resolve_name(entrypoint)(recipe, communicator, stop, scratch)
    except (Exception, ProcessKilled) as error:
        monitor = communicator.monitor
        phase = f"step {monitor.step}, {monitor.point}" if monitor.step else monitor.point
        what = failure(communicator.rank, phase, error, time.time(), monitor.step)
        report(_with_missing(what, scratch, recipe.comm.timeout_seconds))
        raise
    return summary


def _with_missing(what: Failure, scratch: Path | None, timeout_seconds: float) -> Failure:
    """Returns the failure `what`; if it is a lost peer and the heartbeats of this machine's ranks show which peer, then with
    `Failure.missing`. The heartbeats must be read now: all ranks that wait are about to give up too."""
    if what.kind != "peer" or scratch is None:
        return what
    patience = Patience(_LONG * timeout_seconds, _LONG * timeout_seconds)
    seen = seen_now(scratch / HEARTBEATS)
    diagnosis = missed_by(what.rank, seen, patience)
    if diagnosis is None:
        return what
    rank = diagnosis.culprits[0]
    peer = seen[rank]
    phase = f"step {peer.step}, {peer.point}" if peer.step else peer.point
    return replace(what, missing={"rank": rank, "step": peer.step, "phase": phase, "why": diagnosis.why})
