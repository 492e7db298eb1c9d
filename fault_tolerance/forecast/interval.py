"""The checkpoint interval that leaves most of the time for training: by formula, and searched for by simulation."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bagualu.fault_tolerance.forecast.run_model import RunModel
from bagualu.fault_tolerance.forecast.simulate import simulate

_FAILURES_PER_RUN = 50
"""Simulated for the search. Nothing is lost at the end of a run, which lengthens the best interval by half of 1 in so many."""
_FLAT = 0.001
"""Intervals that cost at most this fraction of the time more than the best are about as good."""
_FITTED, _AROUND = 15, 2.0
"""The number of intervals to which a parabola is fitted, and how many times longer and shorter than the middle they are. There the
cost a/x + b x of an interval is a quarter more than at its minimum, and differs from a parabola by 1%."""


def young(save_seconds: float, between_failures: float) -> float:
    """Returns J. Young's interval, "A first order approximation to the optimum checkpoint interval" (1974), in seconds of training
    between two checkpoints."""
    return math.sqrt(2 * save_seconds * between_failures)


def daly(save_seconds: float, between_failures: float) -> float:
    """Returns J. Daly's interval, "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006), equation
    37, in seconds of training between two checkpoints."""
    if save_seconds >= 2 * between_failures:
        return between_failures
    ratio = save_seconds / (2 * between_failures)
    return young(save_seconds, between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


@dataclass(frozen=True)
class BestInterval:
    """The result of the search, in steps."""

    steps: int
    shortest: int
    """The shortest and the longest interval that were tried and cost at most 0.1% of the time more than the best."""
    longest: int
    young: float
    daly: float


def best_interval(model: RunModel, seconds: float, runs: int, seed: int) -> BestInterval | None:
    """Returns the interval between checkpoints in storage with the most progress, or None without failures.

    All intervals meet the same failures. The progress of intervals around the best is fitted by a parabola, because neighbouring
    intervals differ by less than the scatter of the simulation. Without a cost the best is a checkpoint after every step.
    """
    between = model.mean_seconds_between_failures
    if math.isinf(between):
        return None
    seconds = min(seconds, _FAILURES_PER_RUN * between)
    longest = max(1, round(min(seconds, 4 * max(between, model.save_seconds)) / model.step_seconds))
    shortest = min(longest, max(1, math.ceil(model.durable_seconds / model.step_seconds)))  # in a shorter one, training waits
    coarse = _spread(shortest, longest, 2 + math.ceil(math.log2(longest)))
    tried = dict(zip(coarse.tolist(), _progress(model, coarse, seconds, runs, seed), strict=True))
    middle = max(tried, key=lambda steps: tried[steps])
    fine = _spread(max(shortest, middle / _AROUND), min(longest, middle * _AROUND), _FITTED)
    values = _progress(model, fine, seconds, runs, seed)
    if len(fine) == _FITTED:
        found = _fitted(fine, values)
    else:  # so few steps that all intervals were tried
        tried |= dict(zip(fine.tolist(), values, strict=True))
        flat = [steps for steps, value in tried.items() if value >= max(tried.values()) - _FLAT]
        found = max(tried, key=lambda steps: tried[steps]), min(flat), max(flat)
    cost, rollbacks = model.save_seconds + model.slowdown * model.durable_seconds, _between_rollbacks_to_storage(model)
    formulas = [formula(cost, rollbacks) / model.step_seconds for formula in (young, daly)]
    return BestInterval(*found, *formulas)


def _spread(least: float, most: float, count: int) -> NDArray[np.int64]:
    """Returns up to `count` different whole numbers from `least` to `most`, in about equal ratios."""
    return np.unique(np.geomspace(least, most, count).round().astype(np.int64))


def _progress(model: RunModel, intervals: NDArray[np.int64], seconds: float, runs: int, seed: int) -> NDArray[np.float64]:
    result: NDArray[np.float64] = simulate(model, seconds, runs, seed, intervals.tolist()).progress.mean(axis=1)
    return result


def _fitted(intervals: NDArray[np.int64], progress: NDArray[np.float64]) -> tuple[int, int, int]:
    """Fits a parabola in the logarithm of the interval. Returns where it is highest within `intervals`, and the shortest and the
    longest interval that cost at most _FLAT more than its top."""
    logarithms = np.log(intervals)
    curvature, slope, _ = np.polyfit(logarithms, progress, 2)
    if curvature >= 0:
        highest = int(intervals[progress.argmax()])
        return highest, highest, highest
    top = -slope / (2 * curvature)
    width = math.acosh(1 + _FLAT / (-2 * curvature))  # of the cost a/x + b x, which has this curvature at its minimum
    best, shortest, longest = (math.exp(min(max(at, logarithms[0]), most)) for at, most in (
        (top, logarithms[-1]), (top - width, top), (top + width, math.inf)))  # fmt: skip
    return round(best), round(shortest), round(longest)


def _between_rollbacks_to_storage(model: RunModel) -> float:
    """Returns the mean time between failures after which the run goes back to storage: with replicas these are few."""
    loss = model.replica_loss if model.replica_steps else 1.0
    rate = sum(kind.per_second * (1.0 if kind.silent else loss) for kind in model.interruptions)
    return 1 / rate if rate else math.inf
