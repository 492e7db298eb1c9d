"""The effective training time to expect of a recipe on a described cluster.

`run_model` makes the model of the run out of the cluster, the recipe's settings and the assumptions; `forecast` simulates it.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Cluster, Storage
from bagualu.fault_tolerance.config import CheckpointConfig, GuardConfig, RestartConfig
from bagualu.fault_tolerance.forecast.assumptions import Assumptions
from bagualu.fault_tolerance.forecast.run_model import Interruption, RunModel
from bagualu.fault_tolerance.forecast.simulate import RunTotals, simulate
from bagualu.fault_tolerance.ledger.totals import CATEGORIES

_NEVER = 10**9
"""Steps between checkpoints of a run that saves only at its end."""
_COMMIT_STEPS = 2
"""A save is committed at the end of the step after the one in which all ranks have written their parts."""
_RESTARTS_WITH_OWN_PAUSE = 64
_KEEPS_NODE = ("software",)
"""Components whose failures leave the node usable; those of all others take it away until it is repaired."""


@dataclass(frozen=True)
class Workload:
    """What a forecast needs to know of the job."""

    world: int
    """Devices that train."""
    step_seconds: float
    state_bytes: float
    """What a checkpoint holds, over all ranks."""
    replicas: int = 1
    """Data-parallel replicas."""
    micro_batches: int | None = None
    """Of a replica in a step."""
    equal_shares: bool = True
    """Whether all replicas must have equally many (parallel.shares)."""
    writers: int | None = None
    """Ranks that write a part of a checkpoint; None: all."""


@dataclass(frozen=True)
class Settings:
    """What a forecast reads of the recipe."""

    checkpoint: CheckpointConfig
    restart: RestartConfig
    guard: GuardConfig
    timeout_seconds: float = 600.0
    """comm.timeout_seconds"""

    @property
    def hang_seconds(self) -> float:
        """Seconds until a rank that makes no progress is noticed: by the watchdog, else when a communication times out."""
        return min(self.restart.hang_seconds, 0.75 * self.timeout_seconds) or self.timeout_seconds


@dataclass(frozen=True)
class Estimate:
    """A figure of a run, over many simulated runs."""

    mean: float
    low: float
    """5% of the runs are below."""
    high: float
    """5% of the runs are above."""
    mean_error: float
    """The mean over infinitely many runs lies within this much of `mean`, with 90% confidence."""

    @staticmethod
    def of(values: NDArray[np.float64]) -> "Estimate":
        low, high = np.quantile(values, [0.05, 0.95])
        scatter = float(values.std(ddof=1)) if len(values) > 1 else math.inf
        return Estimate(float(values.mean()), float(low), float(high), 1.645 * scatter / math.sqrt(len(values)))


@dataclass(frozen=True)
class EffectiveTime:
    """The outcome of simulated runs."""

    seconds: float
    """Wall time of a run."""
    ratio: Estimate
    """Effective training time ratio: productive / wall time, as in the ledger of a run."""
    progress: Estimate
    """Steps that survived / steps of a run without failures, checkpoints and slower steps."""
    failures: Estimate
    categories: dict[str, float]
    """Mean seconds of a run by category of the ledger."""
    rejoins: float
    """Mean number of restarts because a repaired node joined."""


def run_model(
    cluster: Cluster, work: Workload, settings: Settings, assumptions: Assumptions, spares: int | None = None, rejoin: bool = True
) -> RunModel:
    """Returns the model of a run of `work` on `cluster`.

    `spares` are the nodes that stand by; None: always enough. `rejoin`: whether repaired nodes join an elastic run at once. Raises
    RecipeError if the cluster's file has no failure rates or no storage, or if a figure is impossible.
    """
    checkpoint, restart = settings.checkpoint, settings.restart
    assumptions.validate()
    used = cluster.for_world(work.world)
    if cluster.storage is None or not all(part.failures_per_device_hour for part in used.parts):
        missing = "storage" if cluster.storage is None else "failures_per_device_hour"
        raise RecipeError(f"cluster={cluster.name} has no {missing}, which a forecast of failures needs; give it in the file")
    if spares is not None and spares < 0:
        raise RecipeError(f"spares={spares} must be at least 0, e.g. spares=8, or leave it out if lost nodes are replaced at once")
    model = RunModel(
        step_seconds=work.step_seconds,
        interruptions=_interruptions(used, settings.hang_seconds, assumptions),
        checkpoint_steps=checkpoint.every or _NEVER,
        replica_steps=checkpoint.replica_every,
        replica_loss=assumptions.replica_loss,
        pauses=[restart.pause_seconds(number) for number in range(1, _RESTARTS_WITH_OWN_PAUSE + 1)],
        healthy_seconds=restart.backoff_reset_seconds,
        start_seconds=assumptions.workers_seconds
        + assumptions.connect_seconds_per_device * work.world
        + assumptions.warm_up_steps * work.step_seconds,
        check_steps=settings.guard.check_every,
        nodes=math.ceil(work.world / used.node_devices),
        replicas=work.replicas,
        micro_batches=work.micro_batches,
        equal_shares=work.equal_shares,
        spares=spares,
        swap_seconds=restart.wait_seconds if restart.elastic and spares is not None else assumptions.swap_seconds,
        repair_seconds=assumptions.repair_hours * 3600,
        elastic=restart.elastic,
        rejoin=rejoin,
    )
    model = _with_checkpoints(model, cluster.storage, work, checkpoint.asynchronous, assumptions)
    model.validate()
    return model


def _with_checkpoints(
    model: RunModel, storage: Storage, work: Workload, asynchronous: bool, assumptions: Assumptions
) -> RunModel:  # fmt: skip
    """Returns the model with the times of checkpoints and replicas: a part of the state divided by a bandwidth."""
    writers = work.writers or work.world
    part = work.state_bytes / writers
    together = work.world / writers * assumptions.storage_factor
    write = min(storage.device_bytes_per_second, storage.write_bytes_per_second * together)
    read = min(storage.device_bytes_per_second, storage.read_bytes_per_second * together)
    model = replace(
        model,
        save_seconds=part / write,
        read_seconds=assumptions.resume_seconds + part / min(read, assumptions.verify_bytes_per_second),
        replica_seconds=part / assumptions.replica_bytes_per_second,
        restore_seconds=assumptions.resume_seconds + part / assumptions.verify_bytes_per_second,
    )
    if not asynchronous:
        return model
    return replace(
        model,
        save_seconds=part / assumptions.copy_bytes_per_second,
        durable_seconds=part / write + _COMMIT_STEPS * model.step_seconds,
        slowdown=assumptions.write_slowdown,
    )


def _interruptions(cluster: Cluster, hang_seconds: float, assumptions: Assumptions) -> list[Interruption]:
    """Returns the kinds of failures: for each component those that end a process and those that hang, and silent ones."""
    rates: dict[str, float] = {}
    for part in cluster.parts:
        for component, rate in part.failures_per_device_hour.items():
            per_second = rate * (part.devices or 0) / 3600 * assumptions.failure_factor
            rates[component] = rates.get(component, 0.0) + per_second
    hangs, ends = assumptions.hang_fraction, 1 - assumptions.hang_fraction
    kinds = []
    for component, rate in rates.items():
        loses = component not in _KEEPS_NODE
        kinds.append(Interruption(component, rate * ends, assumptions.exit_seconds, loses))
        kinds.append(Interruption(component, rate * hangs, hang_seconds, loses))
    devices = sum(part.devices or 0 for part in cluster.parts)
    kinds.append(Interruption("silent", assumptions.silent_per_device_hour * devices / 3600, 0.0, silent=True))
    return kinds


def forecast(model: RunModel, seconds: float, runs: int = 200, seed: int = 0) -> EffectiveTime:
    """Returns what `runs` runs of `seconds` each do. Raises RecipeError if a figure is impossible."""
    return _effective_time(simulate(model, seconds, runs, seed))


def _effective_time(totals: RunTotals) -> EffectiveTime:
    categories = {name: float(totals.microseconds[name][0].mean()) / 1e6 for name in CATEGORIES}
    return EffectiveTime(
        seconds=totals.wall / 1e6,
        ratio=Estimate.of(totals.ratio[0]),
        progress=Estimate.of(totals.progress[0]),
        failures=Estimate.of(totals.failures[0].astype(np.float64)),
        categories=categories,
        rejoins=float(totals.rejoins[0].mean()),
    )
