"""A forecast with the best interval and the influence of each assumption, as lines of text and as a JSON document."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bagualu.fault_tolerance.forecast.assumptions import Assumptions
from bagualu.fault_tolerance.forecast.forecast import EffectiveTime, Estimate, forecast
from bagualu.fault_tolerance.forecast.influence import Influence, influences
from bagualu.fault_tolerance.forecast.interval import BestInterval, best_interval
from bagualu.fault_tolerance.forecast.run_model import RunModel
from bagualu.parallel.simulation.seconds_text import span_text

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
        """Returns the report for a reader. Each line begins with what it is about, or with spaces if the line before says that."""
        parts = {"failures": self._failures(), "training": self._training(), "lost": self._lost(), "saves": self._saves(),
                 "moved by": self._moved_by()}  # fmt: skip
        return [
            f"{title if first else '':<9}{line}".rstrip() for title, lines in parts.items() for first, line in _with_first(lines)
        ]

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
        failures, span = self.time.failures, span_text(self.time.seconds)
        rates: dict[str, float] = {}
        for kind in self.model.interruptions:
            rates[kind.component] = rates.get(kind.component, 0.0) + kind.per_second
        total = sum(rates.values())
        if not total:
            yield f"none in {span}"
            return
        shares = ", ".join(f"{name} {rate / total:.0%}" for name, rate in rates.items() if rate)
        runs = f"90% of runs {failures.low:.0f} to {failures.high:.0f}"
        yield f"{_count(failures.mean)} in {span} ({runs}), one every {span_text(1 / total)}: {shares}"
        if self.restart_limit < failures.high:
            yield f"restart.limit={self.restart_limit} would end the launch; give restart.limit={enough_restarts(failures)}"

    def _training(self) -> Iterator[str]:
        yield f"{_ratio(self.time.ratio)} effective training time"
        if self.time.ratio.mean - self.time.progress.mean > 0.0005:
            yield f"{_ratio(self.time.progress)} of the steps of a run without failures and saves: some steps are slower"

    def _lost(self) -> Iterator[str]:
        other = {name: seconds for name, seconds in self.time.categories.items() if name != "productive" and seconds}
        shares = sorted(((seconds / self.time.seconds, name) for name, seconds in other.items()), reverse=True)
        yield ", ".join(f"{name if name != 'lost' else 'repeated steps'} {share:.2%}" for share, name in shares) or "nothing"

    def _saves(self) -> Iterator[str]:
        best = self.best
        if best is None or self.at_best is None:
            return
        flat = "" if best.shortest == best.longest else f"{best.shortest} to {best.longest} cost at most 0.1% more; "
        interval = f"{best.steps} ({span_text(best.steps * self.model.step_seconds)})"
        formulas = f"Young {_count(best.young)}, Daly {_count(best.daly)}"
        yield f"best checkpoint.every={interval}: {self.at_best.ratio.mean:.1%}; {flat}{formulas}"

    def _moved_by(self) -> Iterator[str]:
        for influence in self.influences[:_NAMED]:
            yield (f"{influence.name}={influence.value:.3g}: {influence.progress_at_low:.1%} at {influence.low:.3g}, "
                   f"{influence.progress_at_high:.1%} at {influence.high:.3g}")  # fmt: skip


def report_on(
    modelled: Callable[[Assumptions], RunModel],
    assumptions: Assumptions,
    seconds: float,
    restart_limit: int,
    runs: int = 200,
    runs_of_influences: int = 40,
) -> FailureReport:
    """Returns everything about runs of `seconds` that `modelled` describes. The same question has the same answer. Raises
    RecipeError if a figure is impossible."""
    model = modelled(assumptions)
    time, best = forecast(model, seconds, runs), best_interval(model, seconds, runs, seed=0)
    return FailureReport(
        model=model,
        time=time,
        best=best,
        at_best=None if best is None else forecast(replace(model, checkpoint_steps=best.steps), seconds, runs),
        influences=influences(modelled, assumptions, seconds, runs_of_influences),
        assumptions=assumptions,
        restart_limit=restart_limit,
    )


def _with_first(lines: Iterator[str]) -> Iterator[tuple[bool, str]]:
    """Yields (whether it is the first, line)."""
    for index, line in enumerate(lines):
        yield not index, line


def _ratio(estimate: Estimate) -> str:
    return f"{estimate.mean:.1%} (90% of runs {estimate.low:.1%} to {estimate.high:.1%}; the mean +-{estimate.mean_error:.2%})"


def _count(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def enough_restarts(failures: Estimate) -> int:
    """Returns a round number of restarts, at least twice what 95% of runs need."""
    return 10 * math.ceil(failures.high / 5)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
