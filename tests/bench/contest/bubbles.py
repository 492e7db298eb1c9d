"""How long ranks of a pipeline wait: in a recorded step, on the schedule with the pass times of that step, and by the formula."""

import statistics
from typing import Any

from bagualu.parallel.pipeline.registry import FAMILIES
from bagualu.parallel.pipeline.schedules.formula import Size
from bagualu.parallel.pipeline.schedules.schedule import Action, Kind, Schedule
from bagualu.parallel.pipeline.timeline import Span, Timeline, simulate

Passes = list[dict[str, Any]]
"""The objects of a pipeline.jsonl."""


def row(name: str, schedule: Schedule, steps: list[Passes]) -> dict[str, Any]:
    """Shares of waiting on the schedule `name`, medians over recorded steps. F, I, W (or the whole backward pass as B) are medians
    over the micro-batches, means over the stages. busy: of the rank that works least, against the one that works most."""
    lines = [_timeline(passes, schedule) for passes in steps]
    planned = [float(simulate(schedule, _cost(passes)).own_bubble) for passes in steps]
    times = {kind: _mean([_mean_over_stages(passes, kind) for passes in steps]) for kind in "FBIW"}
    formula, exact = _formula(name, schedule, times)
    measured = statistics.median(float(line.own_bubble) for line in lines)
    return {
        "schedule": name, **{f"{kind} ms": None if times[kind] is None else 1e3 * times[kind] for kind in "FBIW"},
        "busy": statistics.median(_evenness(line) for line in lines), "measured": measured,
        "planned": statistics.median(planned), "formula": formula, "formula is for": exact,
        "measured - planned": measured - statistics.median(planned), "steps": len(steps),
    }  # fmt: skip


def _timeline(passes: Passes, schedule: Schedule) -> Timeline:
    """The recorded step."""
    ranks: list[list[Span]] = [[] for _ in schedule.actions]
    for one in passes:
        action = Action(Kind(one["kind"]), one["micro_batch"], one["stage"])
        ranks[one["rank"]].append(Span(action, one["start"], one["end"]))
    return Timeline(ranks)


def _evenness(line: Timeline) -> float:
    busy = [float(line.busy(rank)) for rank in range(len(line.ranks))]
    return min(busy) / max(busy)


def _cost(passes: Passes) -> Any:
    """The median time of each kind of pass at each stage."""
    medians = _medians(passes)
    return lambda action: medians[str(action.kind), action.stage]


def _medians(passes: Passes) -> dict[tuple[str, int], float]:
    seconds: dict[tuple[str, int], list[float]] = {}
    for one in passes:
        seconds.setdefault((one["kind"], one["stage"]), []).append(one["end"] - one["start"])
    return {place: statistics.median(found) for place, found in seconds.items()}


def _mean_over_stages(passes: Passes, kind: str) -> float | None:
    return _mean([seconds for (one, _), seconds in _medians(passes).items() if one == kind])


def _mean(values: list[float] | list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _formula(name: str, schedule: Schedule, times: dict[str, float | None]) -> tuple[float | None, str]:
    """The published share for these pass times; where nothing is published for them, for passes that take equally long."""
    family, placement = FAMILIES[name].formula, schedule.placement
    shape = (placement.ranks, placement.chunks, schedule.micro_batches)
    whole = times["B"] or 0.0
    measured = Size(*shape, times["F"] or 0.0, times["I"] or whole, times["W"] or 0.0)
    found = family.share(measured)
    if found is not None:
        return float(found), "these times" + " at most" * family.bound
    found = family.share(Size(*shape))
    return (None, "no size like this") if found is None else (float(found), "F = I = W" + " at most" * family.bound)
