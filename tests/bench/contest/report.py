"""From samples to a table and a JSON document. Free of torch."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from contest.entry import PLAIN, Entry
from contest.shapes import Shape
from contest.team import Sample

HEADER = ("contestant", "tokens/s", "step s", "min..max", "cpu s", "memory MB", "MFU %", "x baseline", "x memory")


def result(entry: Entry, shape: Shape, samples: list[Sample], ceiling: float) -> dict[str, Any]:
    """Figures of one contestant: the median over all timed steps of all rounds, and every sample.

    ceiling: FLOP/s of the best matmul on all cores: what MFU is a share of, however many cores were used.
    """
    seconds = [second for sample in samples for second in sample.step_seconds]
    cpu_seconds = [second for sample in samples for second in sample.cpu_seconds]
    median = statistics.median(seconds)
    return {
        "contestant": entry.name,
        **asdict(entry),
        "tokens_per_second": shape.tokens / median,
        "step_seconds": median,
        "step_seconds_min": min(seconds),
        "step_seconds_max": max(seconds),
        "cpu_seconds": statistics.median(cpu_seconds) if cpu_seconds else None,
        "peak_memory_bytes": max(sample.peak_memory_bytes for sample in samples),
        "mfu": shape.flops_per_token * shape.tokens / median / ceiling,
        "samples": [asdict(sample) for sample in samples],
    }


def add_ratios(results: list[dict[str, Any]], baseline: str | None) -> None:
    """Compare with `baseline`, else the fastest plain loop, eager or compiled."""
    plain = [r for r in results if r["contestant"] == baseline] or [r for r in results if r["program"] in PLAIN]
    best = max(plain, key=lambda r: r["tokens_per_second"], default=None)
    for row in results if best is not None else []:
        row["baseline"] = best["contestant"]
        row["ratio"] = row["tokens_per_second"] / best["tokens_per_second"]
        row["memory_ratio"] = row["peak_memory_bytes"] / best["peak_memory_bytes"]


def table(recipe: str, shape: Shape, results: list[dict[str, Any]]) -> str:
    """Plain text, fastest first; a star marks a baseline."""
    baselines = {row.get("baseline") for row in results}
    rows = [HEADER]
    for row in sorted(results, key=lambda row: -row["tokens_per_second"]):
        rows.append((
            row["contestant"] + (" *" if row["contestant"] in baselines else ""),
            f"{row['tokens_per_second']:.0f}",
            f"{row['step_seconds']:.3f}",
            f"{row['step_seconds_min']:.2f}..{row['step_seconds_max']:.2f}",
            f"{row['cpu_seconds']:.2f}" if row["cpu_seconds"] else "-",
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
            f"{100 * row['mfu']:.0f}",
            f"{row['ratio']:.2f}" if "ratio" in row else "-",
            f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "-",
        ))  # fmt: skip
    title = f"{recipe}: {shape.parameters / 1e6:.1f}M parameters, {shape.tokens} tokens a step"
    return "\n".join((title, *aligned(rows)))


def table_of(rows: list[dict[str, Any]]) -> str:
    """Plain text of rows with the same keys; lists and what is nested in a row are for the JSON document, not for here."""
    shown = [key for key, value in rows[0].items() if not isinstance(value, list | dict)]
    return "\n".join(aligned([tuple(shown), *(tuple(_cell(row[key]) for key in shown) for row in rows)]))


def spread(seconds: list[float]) -> str:
    return f"{min(seconds):.3g}..{max(seconds):.3g}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns: the first one begins at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join((first.ljust(widths[0]), *cells)))
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
