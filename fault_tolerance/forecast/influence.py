"""Which assumption moves the forecast most: each changed by itself, with the same failures."""

import math
from collections.abc import Callable
from dataclasses import Field, dataclass, fields, replace
from typing import Any

from bagualu.fault_tolerance.forecast.assumptions import Assumptions
from bagualu.fault_tolerance.forecast.run_model import RunModel
from bagualu.fault_tolerance.forecast.simulate import simulate

_FAILURES_PER_RUN = 100
_STEP = 1.25
"""Factor by which a figure is raised and lowered for its elasticity."""


@dataclass(frozen=True)
class Influence:
    """What an assumption does to the progress of a run."""

    name: str
    value: float
    low: float
    high: float
    """The range in which the figure may lie (Assumptions)."""
    progress_at_low: float
    progress_at_high: float
    elasticity: float
    """By how many percent the time that is not progress grows if the figure grows by 1%; 0 for a figure of 0."""

    @property
    def span(self) -> float:
        """The difference that the range makes."""
        return abs(self.progress_at_high - self.progress_at_low)


def influences(
    model_of: Callable[[Assumptions], RunModel], assumptions: Assumptions, seconds: float, runs: int = 100, seed: int = 0
) -> list[Influence]:
    """Returns the influence of each assumption on the progress of the run that `model_of` describes, the greatest span first."""
    seconds = min(seconds, _FAILURES_PER_RUN * model_of(assumptions).mean_seconds_between_failures)

    def progress(entry: Field[Any], value: float) -> float:
        return float(simulate(model_of(replace(assumptions, **{entry.name: value})), seconds, runs, seed).progress.mean())

    found = []
    for entry in fields(assumptions):
        value = getattr(assumptions, entry.name)
        low, high = min(value, entry.metadata["low"]), max(value, entry.metadata["high"])
        elasticity = 0.0
        if value > 0:
            raised, lowered = (1 - progress(entry, value * factor) for factor in (_STEP, 1 / _STEP))
            elasticity = math.log(raised / lowered) / math.log(_STEP**2)
        found.append(Influence(entry.name, value, low, high, progress(entry, low), progress(entry, high), elasticity))
    return sorted(found, key=lambda influence: influence.span, reverse=True)
