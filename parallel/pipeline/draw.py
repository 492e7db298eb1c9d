"""A picture of a schedule in letters. Free of torch."""

from bagualu.parallel.pipeline.schedule import Action, Kind, Schedule
from bagualu.parallel.pipeline.timeline import per_kind, simulate


def draw(schedule: Schedule) -> str:
    """One line a rank, time going right in steps of one pass; a dot where a rank waits between two passes. Where a schedule splits
    backward passes, those it leaves whole take two steps, the second shown as --."""
    splits = any(action.kind == Kind.WEIGHT_GRADIENT for actions in schedule.actions for action in actions)
    lines = []
    for spans in simulate(schedule, per_kind(1, 1, 1 if splits else 0)).ranks:
        cells = {int(span.start): short(span.action, schedule) for span in spans}
        cells |= {int(span.start) + 1: "--" for span in spans if span.end - span.start == 2}
        first, last = min(cells), max(cells)
        width = max(2, *(len(cell) for cell in cells.values()))
        row = [cells.get(time, "." if time > first else "").ljust(width) for time in range(last + 1)]
        lines.append(" ".join(row).rstrip())
    return "\n".join(lines)


def short(action: Action, schedule: Schedule) -> str:
    """F3, and F3' for a rank's second stage."""
    return f"{action.kind}{action.micro_batch}" + "'" * (action.stage // schedule.placement.ranks)
