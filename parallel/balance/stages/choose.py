"""Chooses a split of layers into stages, or raises an error that says why none fits."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from bagualu.comm.errors import RecipeError
from bagualu.parallel.balance.stages.cost import CostTable
from bagualu.parallel.balance.stages.forecast import Split, by_rank, forecast_split
from bagualu.parallel.balance.stages.partition import GaveUp, Solution, solve
from bagualu.parallel.balance.stages.problem import Piece, Problem
from bagualu.parallel.balance.stages.refine import refine
from bagualu.parallel.pipeline.schedules.schedule import Schedule
from bagualu.parallel.pipeline.split import require_layers

_DIAGNOSIS_WORK = 50_000
_DIAGNOSIS_STEPS = 8


def choose_split(
    table: CostTable,
    schedule: Schedule,
    speeds: Sequence[float] | None = None,
    caps: Sequence[int] | None = None,
    recompute: str = "none",
) -> Split:
    """Returns the best split of the table's layers over the stages of `schedule`: among the splits whose bottleneck (the time of
    the slowest rank) is near the least possible, the one with the least predicted step time (refine.py). Equal arguments give equal
    results.

    `speeds`, relative to the device of the table (None: all 1.0), and `caps`, the most bytes of memory (None: no limit), are by
    pipeline rank. `recompute`: none | full | auto; auto recomputes only where a cap requires it. Raises RecipeError if there are
    fewer layers than stages, if no split fits the caps, or if the search ended before it found one that fits.
    """
    ranks, layers, stages = schedule.placement.ranks, len(table.layers), schedule.placement.stages
    require_layers(layers, schedule.placement)
    problem = Problem(table, schedule, speeds or [1.0] * ranks, caps, recompute)
    try:
        solution = solve(problem)
    except GaveUp:
        raise _undecided(problem) from None
    if solution is None:
        raise _no_split_fits(problem)
    assert len(solution.pieces) == stages
    split = forecast_split(problem, refine(problem, solution.pieces))
    assert split.forecast is not None
    return replace(split, forecast=replace(split.forecast, least_seconds=solution.least_possible_seconds))


def take_split(
    slices: list[range], table: CostTable, schedule: Schedule, caps: Sequence[int] | None = None, recompute: str = "none"
) -> Split:
    """Returns the split into the given `slices`, the layers of each stage, with its forecast at equal speeds. Raises RecipeError if
    it does not fit the memory `caps`."""
    problem = Problem(table, schedule, [1.0] * schedule.placement.ranks, caps, recompute)
    pieces = [(piece.start, piece.stop) for piece in slices]
    if any(problem.cost(rank, mine) is None for rank, mine in enumerate(by_rank(problem, pieces))):
        counts = ",".join(str(len(piece)) for piece in slices)
        others = ["parallel.balance=analytic"]
        if recompute == "none" and _fits(_with_recompute(problem), pieces):
            others.insert(0, "train.recompute=auto")
        raise _does_not_fit(problem, pieces, f"parallel.balance=[{counts}]: ", others)
    return forecast_split(problem, pieces)


def _with_recompute(problem: Problem) -> Problem:
    return Problem(problem.table, problem.schedule, problem.speeds, problem.caps, "auto")


def _fits(problem: Problem, pieces: list[Piece]) -> bool:
    return all(problem.cost(rank, mine) is not None for rank, mine in enumerate(by_rank(problem, pieces)))


def _solution(problem: Problem) -> Solution | None:
    try:
        return solve(problem, _DIAGNOSIS_WORK)
    except GaveUp:
        return None


def _undecided(problem: Problem) -> RecipeError:
    """Returns the error for a search that ended before it could decide whether a split fits."""
    assert problem.caps is not None
    pieces = _least_demanding(problem)
    works = ",".join(map(str, map(max, zip(_needs(problem, pieces), problem.caps, strict=True))))
    counts = ",".join(str(stop - start) for start, stop in pieces)
    return RecipeError(f"found no split that fits parallel.memory_bytes={problem.caps}, but the search was cut short; "
                       f"parallel.balance=[{counts}] is near and fits; give it with parallel.memory_bytes=[{works}]")  # fmt: skip


def _no_split_fits(problem: Problem) -> RecipeError:
    others = []
    if problem.recompute == "none" and _solution(_with_recompute(problem)) is not None:
        others.append("train.recompute=auto")
    return _does_not_fit(problem, _least_demanding(problem), "", others)


def _does_not_fit(problem: Problem, pieces: list[Piece], prefix: str, others: list[str]) -> RecipeError:
    """Returns the error for `pieces`: it names the rank whose memory need exceeds its cap by the largest factor, and caps that
    suffice."""
    caps, needs = problem.caps or [], _needs(problem, pieces)
    rank = max(range(len(caps)), key=lambda r: needs[r] / max(1, caps[r]))
    if len(set(caps)) == 1:
        works = f"parallel.memory_bytes={max(needs)}"
    else:
        works = "parallel.memory_bytes=[" + ",".join(map(str, map(max, zip(needs, caps, strict=True)))) + "]"
    return RecipeError(f"{prefix}pipeline rank {rank} needs {needs[rank]} bytes but parallel.memory_bytes allows "
                       f"{caps[rank]}; give {' or '.join([*others, works])}")  # fmt: skip


def _needs(problem: Problem, pieces: list[Piece]) -> list[int]:
    """Returns the bytes of memory that each rank needs for `pieces`, with the allowed recomputation that needs least."""
    ways = problem.ways(problem.placement.chunks)
    return [min(problem.memory(rank, mine, way) for way in ways) for rank, mine in enumerate(by_rank(problem, pieces))]


def _least_demanding(problem: Problem) -> list[Piece]:
    """Returns a split whose largest ratio of a rank's memory to its cap is near the least possible."""
    assert problem.caps is not None
    layers, stages = problem.layers, problem.placement.stages
    borders = [layers * stage // stages for stage in range(stages + 1)]
    best = list(pairwise(borders))

    def factor(pieces: list[Piece]) -> float:
        return max(need / max(1, cap) for need, cap in zip(_needs(problem, pieces), problem.caps or (), strict=True))

    low, high = 1.0, factor(best)
    for _ in range(_DIAGNOSIS_STEPS):
        middle = (low + high) / 2
        caps = [int(max(1, cap) * middle) for cap in problem.caps]
        solution = _solution(Problem(problem.table, problem.schedule, problem.speeds, caps, problem.recompute))
        if solution is None:
            low = middle
        else:
            best, high = solution.pieces, factor(solution.pieces)
    return best
