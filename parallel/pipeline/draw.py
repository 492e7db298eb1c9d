"""When each pass of a schedule runs, and a picture of it. Free of torch."""

from collections.abc import Mapping

from bagualu.parallel.pipeline.schedule import Action, Kind, Schedule

_EVEN: Mapping[Kind, int] = {Kind.FORWARD: 1, Kind.BACKWARD: 1}


def start_times(schedule: Schedule, cost: Mapping[Kind, int] = _EVEN) -> list[dict[Action, int]]:
    """By stage: when each forward and backward pass begins, if every pass begins as soon as its stage is free and what it
    needs is there, passes take `cost`, and messages take no time. Raises ValueError for passes that wait for each other."""
    passes = [[action for action in actions if action.kind in cost] for actions in schedule]
    starts: list[dict[Action, int]] = [{} for _ in schedule]
    free = [0] * len(schedule)
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(passes):
            for action in actions[len(starts[stage]) :]:
                source = stage - 1 if action.kind == Kind.FORWARD else stage + 1
                inside = 0 <= source < len(schedule)
                if inside and action not in starts[source]:
                    break
                arrival = starts[source][action] + cost[action.kind] if inside else 0
                starts[stage][action] = max(free[stage], arrival)
                free[stage] = starts[stage][action] + cost[action.kind]
                moved = True
    if any(len(done) < len(actions) for done, actions in zip(starts, passes, strict=True)):
        raise ValueError("the passes of this schedule wait for each other; check() says which")
    return starts


def draw(schedule: Schedule) -> str:
    """One line a stage, time going right in steps of one pass; a dot where a stage waits between two passes."""
    lines = []
    for times in start_times(schedule):
        cells = {time: str(action) for action, time in times.items()}
        first, last = min(cells), max(cells)
        width = max(2, *(len(cell) for cell in cells.values()))
        row = [cells.get(time, "." if time > first else "").ljust(width) for time in range(last + 1)]
        lines.append(" ".join(row).rstrip())
    return "\n".join(lines)
