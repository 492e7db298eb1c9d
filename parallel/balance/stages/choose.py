"""Chooses a split of layers into stages, or raises an error that says why none fits."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from bagualu.comm.errors import RecipeError
from bagualu.parallel.balance.stages.activations import ALL_KEPT, Activations
from bagualu.parallel.balance.stages.cost import CostTable
from bagualu.parallel.balance.stages.forecast import Forecast, Split, by_rank, forecast_split
from bagualu.parallel.balance.stages.partition import GaveUp, Solution, solve
from bagualu.parallel.balance.stages.problem import Piece, Problem
from bagualu.parallel.balance.stages.refine import refine
from bagualu.parallel.pipeline.layer_slice import LayerSlice, cut_inside
from bagualu.parallel.pipeline.schedules.schedule import Schedule
from bagualu.parallel.pipeline.split import require_layers

CUT_GAIN = 0.02
"""Stages begin inside layers only if a step is predicted to be shorter by at least this fraction. Measured costs of layers differ
by as much from one measurement to the next."""
_DIAGNOSIS_WORK = 50_000
_DIAGNOSIS_STEPS = 8


def choose_split(
    table: CostTable,
    schedule: Schedule,
    speeds: Sequence[float] | None = None,
    caps: Sequence[int] | None = None,
    activations: Activations = ALL_KEPT,
) -> Split:
    """Returns the best split of the table's layers over the stages of `schedule`: among the splits whose bottleneck (the time of
    the slowest rank) is near the least possible, the one with the least predicted step time (refine.py). Stages begin inside layers
    only if that makes a step shorter by at least the fraction `CUT_GAIN`, or if no split into whole layers was found. Equal
    arguments give equal results.

    `speeds`, relative to the device of the table (None: all 1.0), and `caps`, the most bytes of memory (None: no limit), are by
    pipeline rank. Raises RecipeError if there are fewer layers than stages, if no split fits `caps` and `activations`, or if the
    search ended before it found one that fits.
    """
    require_layers(len(table.layers), schedule.placement)
    problem = Problem(table, schedule, speeds or [1.0] * schedule.placement.ranks, caps, activations)
    try:
        whole, undecided = _best(problem), False
    except GaveUp:
        whole, undecided = None, True
    if split := _cut_inside(problem, whole) or whole:
        return split
    raise _undecided(problem) if undecided else _no_split_fits(problem)


def _best(problem: Problem) -> Split | None:
    """Returns the best split of the problem's units; None if none fits. Raises GaveUp."""
    solution = solve(problem)
    if solution is None:
        return None
    split = forecast_split(problem, refine(problem, solution.pieces))
    assert split.forecast is not None
    return replace(split, forecast=replace(split.forecast, least_seconds=solution.least_possible_seconds))


def _cut_inside(problem: Problem, whole: Split | None) -> Split | None:
    """Returns the best split whose stages may begin inside layers, if it is worth it compared with `whole`, the best into whole
    layers; else None."""
    if problem.placement.ranks == 1 or not all(layer.halves for layer in problem.table.layers):
        return None
    if whole and _forecast(whole).bottleneck_seconds * (1 - CUT_GAIN) <= problem.even_seconds():
        return None
    try:
        split = _best(problem.with_halves())
    except GaveUp:
        return None
    if whole and split and _forecast(split).step_seconds > _forecast(whole).step_seconds * (1 - CUT_GAIN):
        return None
    return split


def _forecast(split: Split) -> Forecast:
    assert split.forecast is not None
    return split.forecast


def take_split(
    slices: list[LayerSlice],
    table: CostTable,
    schedule: Schedule,
    caps: Sequence[int] | None = None,
    activations: Activations = ALL_KEPT,
) -> Split:
    """Returns the split into the given `slices`, the layers of each stage, with its forecast at equal speeds. Raises RecipeError if
    it does not fit the memory `caps` and `activations`."""
    halves = cut_inside(slices)
    problem = Problem(table, schedule, [1.0] * schedule.placement.ranks, caps, activations, halves)
    pieces = problem.pieces(slices)
    if not _fits(problem, pieces):
        several, counts = len(slices) > 1, ",".join(str(one.count) for one in slices)
        others = ["parallel.balance=analytic"] if several and _solution(problem) is not None else []
        if activations.recompute is not None and _fits(_with_recompute(problem), pieces):
            others.insert(0, "train.recompute=auto")
        raise _does_not_fit(problem, pieces, f"parallel.balance=[{counts}]: " if several else "", others)
    return forecast_split(problem, pieces)


def _with_recompute(problem: Problem) -> Problem:
    activations = replace(problem.activations, recompute=None)
    return Problem(problem.table, problem.schedule, problem.speeds, problem.caps, activations, problem.halves)


def _fits(problem: Problem, pieces: list[Piece]) -> bool:
    return all(problem.cost(rank, mine) is not None for rank, mine in enumerate(by_rank(problem, pieces)))


def _solution(problem: Problem) -> Solution | None:
    try:
        return solve(problem, _DIAGNOSIS_WORK)
    except GaveUp:
        return None


def _undecided(problem: Problem) -> RecipeError:
    """Returns the error for a search that ended before it could decide whether a split fits."""
    pieces = _least_demanding(problem)
    counts = ",".join(str(problem.slice_of(piece).count) for piece in pieces)
    limits = " and ".join(_limits(problem))
    works = " ".join(_limits(problem, _needs(problem, pieces)))
    return RecipeError(f"found no split that fits {limits}, but the search was cut short; "
                       f"give parallel.balance=[{counts}] {works}, which is near and fits")  # fmt: skip


def _no_split_fits(problem: Problem) -> RecipeError:
    others = []
    if problem.activations.recompute is not None and _solution(_with_recompute(problem)) is not None:
        others.append("train.recompute=auto")
    return _does_not_fit(problem, _least_demanding(problem), "", others)


def _does_not_fit(problem: Problem, pieces: list[Piece], prefix: str, others: list[str]) -> RecipeError:
    """Returns the error for `pieces`: it names the rank that exceeds its limits by the largest factor, and limits that suffice.
    `others` are fixes that leave the limits as they are."""
    needs, most = _needs(problem, pieces), problem.activations.most_bytes
    rank = max(range(len(needs)), key=lambda rank: _factor(problem, rank, needs[rank]))
    memory, activations = needs[rank]
    if most is not None and activations > most:
        what = (f"activations of {activations} bytes with all its layers recomputed, {activations - most} more than "
                f"train.recompute=bytes:{most} allows")  # fmt: skip
    else:
        assert problem.caps is not None
        what = f"{memory} bytes but parallel.memory_bytes allows {problem.caps[rank]}"
    works = " ".join(limit for limit in _limits(problem, needs) if limit not in _limits(problem))
    return RecipeError(f"{prefix}pipeline rank {rank} needs {what}; give {' or '.join([*others, works])}")


Needs = tuple[int, int]
"""The least bytes that a rank needs: of all memory, and of memory for activations."""


def _needs(problem: Problem, pieces: list[Piece]) -> list[Needs]:
    """Returns what each rank needs for `pieces`, with the allowed recomputation that needs least."""
    return [problem.least_bytes(rank, mine) for rank, mine in enumerate(by_rank(problem, pieces))]


def _factor(problem: Problem, rank: int, needs: Needs) -> float:
    """Returns the largest ratio of what `rank` needs to what a limit allows."""
    limits = [problem.caps[rank] if problem.caps else None, problem.activations.most_bytes]
    return max(need / max(1, limit) for need, limit in zip(needs, limits, strict=True) if limit is not None)


def _limits(problem: Problem, needs: list[Needs] | None = None) -> list[str]:
    """Returns the limits of memory as the user types them, those that do not suffice for `needs` raised."""
    found, most, caps = [], problem.activations.most_bytes, problem.caps
    needs = needs or [(0, 0)] * len(problem.speeds)
    if caps is not None:
        works = [max(cap, memory) for cap, (memory, _) in zip(caps, needs, strict=True)]
        same = len(set(caps)) == 1
        found.append(f"parallel.memory_bytes={max(works) if same else '[' + ','.join(map(str, works)) + ']'}")
    if most is not None:
        found.append(f"train.recompute=bytes:{max(most, *(activations for _, activations in needs))}")
    return found


def _least_demanding(problem: Problem) -> list[Piece]:
    """Returns a split whose largest ratio of what a rank needs to what a limit allows is near the least possible."""
    units, stages = problem.units, problem.placement.stages
    borders = [units * stage // stages for stage in range(stages + 1)]
    best = list(pairwise(borders))

    def factor(pieces: list[Piece]) -> float:
        return max(_factor(problem, rank, needs) for rank, needs in enumerate(_needs(problem, pieces)))

    low, high = 1.0, factor(best)
    for _ in range(_DIAGNOSIS_STEPS):
        middle = (low + high) / 2
        solution = _solution(_scaled(problem, middle))
        if solution is None:
            low = middle
        else:
            best, high = solution.pieces, factor(solution.pieces)
    return best


def _scaled(problem: Problem, factor: float) -> Problem:
    """Returns `problem` with all limits multiplied by `factor`."""
    caps = None if problem.caps is None else [int(max(1, cap) * factor) for cap in problem.caps]
    most = problem.activations.most_bytes
    activations = replace(problem.activations, most_bytes=None if most is None else int(most * factor))
    return Problem(problem.table, problem.schedule, problem.speeds, caps, activations, problem.halves)
