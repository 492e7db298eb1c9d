"""Simulates a run that fails at random, from event to event, for many runs and several checkpoint intervals side by side.

Failures and repairs are memoryless, so the time to the next event is drawn anew after each event, and what a run did since its last
start follows in closed form (stretch.py). The time that this takes depends on the number of failures, not on devices or steps. No
failure strikes between a failure and the restart after it: it would be answered together with the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.forecast.run_model import MICROSECONDS, RunModel
from bagualu.fault_tolerance.forecast.stretch import Cycle, Integers, stretch
from bagualu.fault_tolerance.ledger.totals import CATEGORIES

Booleans = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RunTotals:
    """What simulated runs did. All arrays are [checkpoint interval, run]."""

    wall: int
    """Microseconds of each run."""
    microseconds: dict[str, Integers]
    """By category of the ledger; their sum is `wall`."""
    steps: Integers
    """Steps whose result survived."""
    failures: Integers
    rejoins: Integers
    """Restarts of an elastic run because a repaired node joined."""
    step: int
    """Microseconds of a step of the whole run."""

    @property
    def ratio(self) -> Floats:
        """The effective training time ratio of the ledger: productive time / wall time."""
        return self.microseconds["productive"].astype(np.float64) / self.wall

    @property
    def progress(self) -> Floats:
        """The steps that survived, as a fraction of those of a run without failures and checkpoints. It is less than `ratio` if
        steps were slower: with fewer replicas, or beside the writing of checkpoints."""
        return self.steps.astype(np.float64) * (self.step / self.wall)


def simulate(model: RunModel, seconds: float, runs: int, seed: int, intervals: Sequence[int] = ()) -> RunTotals:
    """Returns what `runs` runs of `seconds` each did, for each number of steps in `intervals` between checkpoints (default: that of
    the model). The same seed gives the same draws to all intervals and to models with other figures.

    Raises RecipeError if the model or the time is impossible.
    """
    model.validate()
    wall = round(seconds * MICROSECONDS) if 0 < seconds < 1e9 else 0
    if wall < 1 or runs < 1:
        raise RecipeError(
            f"failures: seconds={seconds} and runs={runs} must be above 0, and at most 30 years, e.g. days=14 runs=200"
        )
    state = _Runs(model, wall, runs, np.array(intervals or [model.checkpoint_steps], dtype=np.int64)[:, None])
    draws = np.random.default_rng(seed)
    while (state.now < wall).any():
        state.advance(draws.standard_exponential((2, runs)), draws.random((4, runs)))
    return RunTotals(wall, state.totals, state.reached, state.failures, state.rejoins, _micro(model.step_seconds))


def _micro(seconds: float) -> int:
    return round(seconds * MICROSECONDS)


class _Runs:
    """The state of all runs; arrays are [interval, run]."""

    def __init__(self, model: RunModel, wall: int, runs: int, intervals: Integers) -> None:
        self.model, self.wall, self.intervals = model, wall, intervals
        shape = (len(intervals), runs)
        zeros = lambda: np.zeros(shape, dtype=np.int64)  # noqa: E731
        self.now = zeros()
        """Wall time."""
        self.elapsed = zeros()
        """Time of the stretch that is going on."""
        self.start = zeros() + _micro(model.start_seconds)
        """Time of the start with which it began."""
        self.begun, self.reached, self.stored = zeros(), zeros(), zeros()
        """Steps before the stretch, steps that survived, steps of the newest checkpoint in storage."""
        self.unstored = zeros()
        """Productive time since that checkpoint."""
        self.out = zeros()
        """Nodes under repair."""
        self.replicas = zeros() + model.replicas
        self.totals = {name: zeros() for name in CATEGORIES}
        self.failures, self.rejoins = zeros(), zeros()
        self.paused, self.restarted = zeros(), zeros()
        """Pauses since they last began with the first, and when the last one ended."""
        kinds = model.interruptions
        self.rate = sum(kind.per_second for kind in kinds)
        self.cumulative = np.cumsum([kind.per_second for kind in kinds]) / (self.rate or 1.0)
        self.silent = np.array([kind.silent for kind in kinds] or [False])
        self.loses = np.array([kind.loses_node for kind in kinds] or [False])
        self.detection = np.array([_micro(kind.detection_seconds) for kind in kinds] or [0])
        self.usable = model.usable_replicas()
        self.repair_time = max(1.0, model.repair_seconds * MICROSECONDS)
        self.pauses = np.array([_micro(pause) for pause in model.pauses])
        slowed = _micro(model.durable_seconds * model.slowdown)
        steps = [0, *(_micro(model.step_seconds_with(count)) for count in range(1, model.replicas + 1))]
        self.step_times = np.array(steps) + slowed // intervals  # [interval, replicas]

    def advance(self, exponential: Floats, uniform: Floats) -> None:
        """Goes to the next event of each run: a failure, a repair, or its end."""
        left = self.wall - self.now
        with np.errstate(divide="ignore"):
            failure = exponential[0] / (self.rate * self.replicas / self.model.replicas) * MICROSECONDS
            repair = exponential[1] * self.repair_time / self.out
        passed = np.minimum(np.minimum(failure, repair), left).astype(np.int64)
        self.elapsed += passed
        self.now += passed
        live = left > 0
        failed = live & (failure < left) & (failure <= repair)
        repaired = live & (repair < left) & ~failed
        self.out -= repaired
        rejoined = repaired & self.model.elastic & self.model.rejoin
        if (closed := rejoined | failed | (live & ~repaired)).any():
            self._close(closed, failed, rejoined, uniform)

    def _close(self, closed: Booleans, failed: Booleans, rejoined: Booleans, uniform: Floats) -> None:
        """Ends the stretches `closed`, of which some `failed` and others stop because a node `rejoined`."""
        model, totals = self.model, self.totals
        kind = np.minimum(np.searchsorted(self.cumulative, uniform[0]), len(self.silent) - 1)
        silent = failed & self.silent[kind]
        step = np.take_along_axis(self.step_times, self.replicas, axis=1)
        unknown = np.where(silent, (uniform[1] * model.check_steps * step).astype(np.int64), 0)
        done = stretch(self._cycle(step), self.elapsed, self.start, self.begun % self.intervals, unknown)

        finished = (done.partial > 0) & rejoined  # a stop on request comes after the step
        steps = done.steps + finished
        replicating = self._cycle(step).replica
        totals["start"] += closed * done.start
        totals["checkpoint"] += closed * (done.checkpoint + finished * np.minimum(replicating, done.partial))
        totals["productive"] += closed * (done.steps * step)
        partial = np.where(finished, np.maximum(0, done.partial - replicating), done.partial)
        totals["lost"] += failed * partial
        totals["productive"] += (closed & ~failed) * partial
        newly = closed & (done.durable > 0)
        self.stored = np.where(newly, self.begun // self.intervals * self.intervals + done.durable * self.intervals, self.stored)
        self.unstored = np.where(newly, (self.begun + done.steps - self.stored) * step, self.unstored + closed * done.steps * step)
        self.reached = np.where(closed, self.begun + steps, self.reached)
        self._stop(rejoined, finished, done.finishing)
        from_replica = self._fail(failed, silent, step, uniform)
        self._repair(failed, kind, silent, uniform)
        self._restart(failed | rejoined, silent, from_replica)

    def _cycle(self, step: Integers) -> Cycle:
        model = self.model
        replica = _micro(model.replica_seconds / model.replica_steps) if model.replica_steps else 0
        return Cycle(self.intervals, step, np.array(replica), _micro(model.save_seconds), _micro(model.durable_seconds))

    def _charge(self, category: str, amount: Integers) -> None:
        """Lets `amount` of time pass, but not beyond the end of a run."""
        amount = np.minimum(amount, self.wall - self.now)
        self.totals[category] += amount
        self.now += amount

    def _stop(self, rejoined: Booleans, finished: Booleans, finishing: Integers) -> None:
        """Ends runs on request: after the step or save that is going on, with a checkpoint. Runs that have not begun a step save
        nothing."""
        self.rejoins += rejoined
        self._charge("productive", finished * finishing)
        begun = rejoined & (self.elapsed > self.start)
        saved = _micro(self.model.save_seconds) + _micro(self.model.durable_seconds)
        self._charge("checkpoint", (begun & ~finished) * finishing + begun * saved)
        self.stored = np.where(begun, self.reached, self.stored)
        self.unstored = np.where(begun, 0, self.unstored)

    def _fail(self, failed: Booleans, silent: Booleans, step: Integers, uniform: Floats) -> Booleans:
        """Takes failed runs back to the state that is left of them. Returns which of them have it from a replica."""
        model = self.model
        self.failures += failed
        every = model.replica_steps or 1
        from_replica: Booleans = failed & ~silent & (uniform[2] >= model.replica_loss) & (model.replica_steps > 0)
        kept = np.maximum(np.maximum(self.begun, self.reached // every * every), self.stored)
        lost = np.where(from_replica, (self.reached - kept) * step, failed * self.unstored)
        self.totals["productive"] -= lost
        self.totals["lost"] += lost
        self.unstored -= lost
        self.reached = np.where(from_replica, kept, np.where(failed, self.stored, self.reached))
        return from_replica

    def _repair(self, failed: Booleans, kind: NDArray[np.intp], silent: Booleans, uniform: Floats) -> None:
        """Lets the time until the restart pass: the failure is noticed, a lost node is replaced or given up."""
        model = self.model
        loud = failed & ~silent
        lost_node = loud & self.loses[kind]
        self._charge("detection", loud * self.detection[kind])
        healthy = self.now - self.restarted >= _micro(model.healthy_seconds)
        self.paused = np.where(loud & healthy, 0, self.paused)
        pause = self.pauses[np.minimum(self.paused, len(self.pauses) - 1)]
        self.paused += loud
        self.restarted = np.where(loud, self.now + pause, self.restarted)
        self._charge("waiting", loud * pause + lost_node * _micro(model.swap_seconds))
        if model.spares is None:
            return
        self.out += lost_node
        short = self.out > model.spares
        if model.elastic:
            short = self._usable() < 1
        with np.errstate(divide="ignore", invalid="ignore"):
            wait = -np.log1p(-uniform[3]) * self.repair_time / self.out
        waiting = lost_node & short
        self._charge("waiting", np.where(waiting, np.minimum(wait, self.wall), 0).astype(np.int64))
        self.out -= waiting

    def _restart(self, restarted: Booleans, silent: Booleans, from_replica: Booleans) -> None:
        """Begins the next stretch of runs."""
        model = self.model
        start, read, restore = _micro(model.start_seconds), _micro(model.read_seconds), _micro(model.restore_seconds)
        state = np.where(from_replica, restore, np.where(self.stored > 0, read, 0))
        self.start = np.where(restarted, state + np.where(silent, 0, start), self.start)
        self.elapsed = np.where(restarted, 0, self.elapsed)
        self.begun = np.where(restarted, self.reached, self.begun)
        if model.spares is not None and model.elastic:
            self.replicas = np.where(restarted, self._usable(), self.replicas)

    def _usable(self) -> Integers:
        """Returns the number of replicas with which each run can go on."""
        left: Integers = (self.model.nodes + (self.model.spares or 0) - self.out).clip(0, self.model.nodes)
        usable: Integers = self.usable[left]
        return usable
