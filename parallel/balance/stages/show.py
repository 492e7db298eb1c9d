"""Formats a split as a table."""

from collections.abc import Sequence

from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.layout import StagePlacement


def show_split(split: Split, placement: StagePlacement, measured: Sequence[tuple[float, float]] | None = None) -> str:
    """Returns a table with a row per stage: its rank and layers; if any layer recomputes activations, what this stage's layers
    recompute; and, if the costs are known, the rank's speed, the milliseconds of a micro-batch's forward and whole backward pass,
    and, at the rank's first stage, the rank's memory. A last line then gives the predicted times of the whole split.

    `measured` holds the measured (forward, backward) seconds per micro-batch of each stage; None: no such columns.
    """
    forecast = split.forecast
    head = ["stage", "rank", "layers", "count"]
    recomputes = any(part != "none" for part in split.recompute)
    if recomputes:
        head.append("recompute")
    if forecast is not None:
        head += ["speed", "forward ms", "backward ms", "rank's memory MiB"]
    if measured is not None:
        head += ["measured forward ms", "measured backward ms"]
    rows = [head]
    for stage, layers in enumerate(split.slices):
        rank = placement.rank_of(stage)
        row = [str(stage), str(rank), str(layers), str(layers.count)]
        if recomputes:
            row.append(_recomputed([part.again(split.recompute[layer]) for layer, part in layers.parts().items()]))
        if forecast is not None:
            times = forecast.times[stage]
            first = placement.stages_of(rank)[0] == stage
            row += [f"{forecast.speeds[rank]:.2f}", _milliseconds(times.forward), _milliseconds(times.total - times.forward)]
            row.append(f"{forecast.memory_bytes[rank] / 2**20:.1f}" if first else "")
        if measured is not None:
            row += [_milliseconds(seconds) for seconds in measured[stage]]
        rows.append(row)
    lines = aligned(rows)
    if forecast is not None:
        least = f" (lower bound {_milliseconds(forecast.least_seconds)})" if forecast.least_seconds else ""
        lines.append(f"predicted ({forecast.source}): slowest rank {_milliseconds(forecast.bottleneck_seconds)} ms per micro-batch"
                     f"{least}, {_milliseconds(forecast.step_seconds)} ms for the passes of a step")  # fmt: skip
    return "\n".join(lines)


def _recomputed(parts: list[str]) -> str:
    """Returns what the layers of a stage recompute, given the part of each, e.g. full, or full in 3."""
    found = sorted(set(parts) - {"none"})
    every = len(found) == 1 and "none" not in parts
    return ", ".join(part if every else f"{part} in {parts.count(part)}" for part in found) or "none"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g}" if seconds < 1 else f"{seconds * 1000:.0f}"


def aligned(rows: list[list[str]]) -> list[str]:
    """Returns a line per row, with the cells of a column aligned at their right ends."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
