"""A forecast as lines of text and as a JSON document."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from bagualu.fault_tolerance.forecast.assumptions import Assumptions
from bagualu.fault_tolerance.forecast.forecast import EffectiveTime, Estimate
from bagualu.fault_tolerance.forecast.influence import Influence
from bagualu.fault_tolerance.forecast.interval import BestInterval
from bagualu.fault_tolerance.forecast.run_model import RunModel

_NAMED = 3
"""The number of assumptions that the text names."""


@dataclass(frozen=True)
class FailureReport:
    """Everything that is told of a forecast."""

    model: RunModel
    time: EffectiveTime
    best: BestInterval | None
    at_best: EffectiveTime | None
    """The same run with the best interval between checkpoints; None without failures."""
    influences: Sequence[Influence]
    assumptions: Assumptions
    restart_limit: int
    """restart.limit of the recipe."""

    def lines(self) -> list[str]:
        """Returns the report for a reader."""
        return [*self._failures(), *self._time(), *self._interval(), *self._assumptions()]

    def document(self) -> dict[str, Any]:
        """Returns the report for a program; infinite figures are null."""
        best = None if self.best is None else {name: _finite(value) for name, value in asdict(self.best).items()}
        return {
            "effective_training_time_ratio": asdict(self.time.ratio),
            "progress": asdict(self.time.progress),
            "failures": asdict(self.time.failures),
            "mean_seconds_between_failures": _finite(self.model.mean_seconds_between_failures),
            "seconds": self.time.seconds,
            "categories": self.time.categories,
            "rejoins": self.time.rejoins,
            "checkpoint_interval": {"steps": self.model.checkpoint_steps, "best": best},
            "at_best_interval": None if self.at_best is None else asdict(self.at_best.ratio),
            "influences": [asdict(influence) for influence in self.influences],
            "assumptions": {
                entry.name: {"value": getattr(self.assumptions, entry.name), "source": entry.metadata["source"]}
                for entry in fields(self.assumptions)
            },
        }

    def _failures(self) -> Iterator[str]:
        if not self.time.failures.mean:
            yield f"no failures in {_span(self.time.seconds)}"
            return
        rates: dict[str, float] = {}
        for kind in self.model.interruptions:
            rates[kind.component] = rates.get(kind.component, 0.0) + kind.per_second
        total = sum(rates.values())
        shares = ", ".join(f"{name} {rate / total:.0%}" for name, rate in rates.items() if rate)
        failures = self.time.failures
        yield (f"{failures.mean:.0f} failures in {_span(self.time.seconds)} ({failures.low:.0f} to {failures.high:.0f}), "
               f"one every {_span(1 / total)}: {shares}")  # fmt: skip
        if self.restart_limit < failures.high:
            yield (f"restart.limit={self.restart_limit} would end the launch after so many restarts; "
                   f"give restart.limit={_above(failures.high)}")  # fmt: skip

    def _time(self) -> Iterator[str]:
        yield f"effective training time {_ratio(self.time.ratio)}"
        if self.time.ratio.mean - self.time.progress.mean > 0.0005:
            yield f"some steps are slower: progress {_ratio(self.time.progress)} of a run without failures and checkpoints"
        other = {name: seconds for name, seconds in self.time.categories.items() if name != "productive" and seconds}
        shares = sorted(((seconds / self.time.seconds, name) for name, seconds in other.items()), reverse=True)
        yield "the rest: " + ", ".join(f"{name} {share:.2%}" for share, name in shares)

    def _interval(self) -> Iterator[str]:
        if self.best is None or self.at_best is None:
            return
        best = self.best
        yield (f"best checkpoint.every={best.steps} ({_span(best.steps * self.model.step_seconds)}): effective training time "
               f"{self.at_best.ratio.mean:.1%}; {best.shortest} to {best.longest} cost at most 0.1% more; "
               f"Young {_steps(best.young)}, Daly {_steps(best.daly)}")  # fmt: skip

    def _assumptions(self) -> Iterator[str]:
        for influence in self.influences[:_NAMED]:
            yield (f"{influence.name}={influence.value:g}: from {influence.low:g} to {influence.high:g}, progress goes from "
                   f"{influence.progress_at_low:.1%} to {influence.progress_at_high:.1%}")  # fmt: skip


def _ratio(estimate: Estimate) -> str:
    return f"{estimate.mean:.1%} (90% of runs {estimate.low:.1%} to {estimate.high:.1%}; mean +-{estimate.mean_error:.2%})"


def _steps(steps: float) -> str:
    return f"{steps:.3g}" if steps < 1000 else f"{steps:.0f}"


def _above(count: float) -> int:
    """Returns a round number of at least twice `count`."""
    return 10 * math.ceil(count / 5)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _span(seconds: float) -> str:
    """Returns a time in a unit that suits it."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
