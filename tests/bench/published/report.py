"""The tables of errors that are printed, from rows with their predictions."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from math import ceil

from .predicted import CALIBRATION, LEFT_OUT, TEST, Predicted, errors

LEAST_OF_SOURCE = 10
"""A source with fewer rows of test has no line of its own."""
LEAST_OF_RANKING = 5
"""A model and date with fewer layouts that ran has no ranking."""


def quantile(values: Iterable[float], fraction: float) -> float:
    """Returns the smallest of `values` that at least `fraction` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, ceil(fraction * len(ordered)) - 1)]


def report(rows: Sequence[Predicted]) -> str:
    """Returns all tables as text."""
    tested = [row for row in rows if row.used == TEST]
    calibrated = {row.run.cluster.name for row in rows if row.used == CALIBRATION and row.run}
    own = [row for row in tested if row.run and row.run.cluster.name in calibrated]
    others = [row for row in tested if row.run and row.run.cluster.name not in calibrated]
    parts = [
        _table("step time, test rows of chips with single-node rows", _groups(own, "all", _source), "step_seconds"),
        _table("step time, test rows by chip", _groups(own, None, _chip), "step_seconds"),
        _table("step time, test rows of chips without single-node rows", _groups(others, None, _chip), "step_seconds"),
        _table("step time, rows of calibration, which say nothing of accuracy",
               _groups([row for row in rows if row.used == CALIBRATION], "all", _chip), "step_seconds"),
        _table("memory as the driver reports it, with context_bytes",
               _groups([row for row in rows if not row.published.only_tensors], "all", _source), "memory_bytes"),
        _table("memory of tensors", _groups([row for row in rows if row.published.only_tensors], "all", _source), "memory_bytes"),
        _fits(rows),
        _rankings(tested),
        _left_out(rows),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _source(row: Predicted) -> str:
    return row.row.text("source")


def _chip(row: Predicted) -> str:
    return f"{row.run.cluster.name} {row.run.recipe.train.dtype}" if row.run else ""


def _groups(
    rows: Sequence[Predicted], total: str | None, name: Callable[[Predicted], str]
) -> list[tuple[str, Sequence[Predicted]]]:
    """Returns the rows by name, the large groups alone where a line for all of them comes first."""
    named = [(key, list(group)) for key, group in groupby(sorted(rows, key=name), key=name)]
    if total is None:
        return list(named)
    return [(total, rows), *(group for group in named if len(group[1]) >= LEAST_OF_SOURCE)]


def _table(title: str, groups: Sequence[tuple[str, Sequence[Predicted]]], figure: str) -> str:
    lines = [f"{title}\n{'':58}rows  median    90%  worst    mean"]
    for name, rows in groups:
        found = list(errors(rows, figure))
        if not found:
            continue
        sizes = [abs(error) for error in found]
        lines.append(
            f"{name[:56]:58}{len(found):4}{quantile(sizes, 0.5):8.1%}{quantile(sizes, 0.9):7.1%}{max(sizes):7.1%}"
            f"{sum(found) / len(found):+8.1%}"
        )
    return "\n".join(lines) if len(lines) > 1 else ""


def _fits(rows: Sequence[Predicted]) -> str:
    found = [row for row in rows if row.figures and row.figures.fits is not None and row.published.fits is not None]
    ran_out = [row for row in found if not row.published.fits]
    right = [row for row in ran_out if row.figures and not row.figures.fits]
    wrong = [row for row in found if row.published.fits and row.figures and not row.figures.fits]
    named = f" ({', '.join(row.row.text('run_id') for row in wrong[:20])})" if wrong else ""
    unknown = [row for row in rows if row.figures and row.figures.fits is None]
    over = sum(row.figures.memory_bytes > row.run.cluster.parts[0].chip.memory_bytes for row in unknown if row.figures and row.run)
    return (
        f"rows that do not say what is computed again: {len(unknown)}, of which {over} would not fit if nothing is\n"
        f"ran out of memory: {len(ran_out)} rows, predicted so: {len(right)}\n"
        f"ran: {len(found) - len(ran_out)} rows, predicted to run out of memory: {len(wrong)}{named}"
    )


def _rankings(rows: Sequence[Predicted]) -> str:
    """Returns, for each model and date of a sweep over layouts, how much longer than the best measured layout that takes which is
    predicted to be the best."""
    lines = []
    sweeps = [row for row in rows if row.figures and row.published.step_seconds and "BLOOM" in row.row.text("model")]
    for (model, date), group in groupby(sorted(sweeps, key=_sweep), key=_sweep):
        members = list(group)
        if len(members) < LEAST_OF_RANKING:
            continue
        measured = [_per_sequence(row, row.published.step_seconds) for row in members]
        found = [_per_sequence(row, row.figures.step_seconds if row.figures else None) for row in members]
        chosen = measured[found.index(min(found))]
        lines.append(f"{model} {date:12}{len(members):5}{chosen / min(measured) - 1:9.1%}{correlation(measured, found):13.2f}")
    return "\n".join([f"layouts{'':22}rows   longer  correlation", *lines]) if lines else ""


def _sweep(row: Predicted) -> tuple[str, str]:
    return row.row.text("model"), row.row.text("date")


def _per_sequence(row: Predicted, seconds: float | None) -> float:
    """Returns the time of a step by its sequences, because batches differ a little between layouts."""
    return (seconds or 0.0) / (row.row.number("gbs") or 1.0)


def correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Returns Spearman's rank correlation of two lists, of which equal values have the mean of their ranks."""
    x, y = _ranks(left), _ranks(right)
    mean = (len(x) + 1) / 2
    product = sum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True))
    squares = sum((a - mean) ** 2 for a in x) * sum((b - mean) ** 2 for b in y)
    return product / squares**0.5 if squares else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [(2 * ordered.index(value) + ordered.count(value) + 1) / 2 for value in values]


def _left_out(rows: Sequence[Predicted]) -> str:
    reasons = Counter(row.reason for row in rows if row.used == LEFT_OUT)
    return "\n".join([f"left out: {reasons.total()} rows", *(f"{count:5}  {reason}" for reason, count in reasons.most_common())])
