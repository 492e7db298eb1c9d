"""Draws a schedule as text."""

from bagualu.parallel.pipeline.schedules.schedule import Action, Kind, Schedule
from bagualu.parallel.pipeline.timeline import per_kind, simulate


def draw(schedule: Schedule) -> str:
    """Returns a drawing with a line per rank. Time runs to the right; each pass takes one time step.

    A dot is a time step in which a rank waits. In schedules that split backward passes, a whole backward pass takes two steps; the
    second is shown as --.
    """
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
    """Returns the name of a pass, e.g. F3, or F3' at a rank's second stage."""
    return f"{action.kind}{action.micro_batch}" + "'" * (action.stage // schedule.placement.ranks)
