"""Turns a split of least bottleneck into the split that the schedule runs fastest.

The bottleneck alone does not determine how long the pipeline takes to fill and drain, nor the load of the other ranks, and many
splits share it. So splits near the optimum are timed on the schedule itself. Of the timed splits whose bottleneck exceeds the least
by at most the fraction `TOLERANCE`, the result is the split with the least predicted step time, or the most even if several have
it.

Candidates come from moving a unit from any stage to any other, or moving two borders by a unit each, first to make ranks and
stages even, then to lower the time. If there are few splits, all of them are candidates.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, combinations_with_replacement, pairwise, product
from math import comb

from bagualu.parallel.balance.stages.forecast import by_rank, forecast_split
from bagualu.parallel.balance.stages.problem import Piece, Problem, RankCost

TOLERANCE = 0.03
PASSES = 60_000
"""Number of passes that may be simulated in total to time splits, which takes about a second; at least _LEAST_TIMED splits are
timed."""
_LEAST_TIMED = 6
_EVENING = 20_000
_FEW = 2_000
_ROUNDING = 1e-9


def refine(problem: Problem, pieces: list[Piece]) -> list[Piece]:
    """Returns an improved split, as the beginning of this file describes. `pieces`, by stage, is a split with the least
    bottleneck."""
    loads = _loads(problem, pieces)
    assert loads is not None
    optimum = _bottleneck(loads)
    current = _even(problem, pieces, optimum * (1 + _ROUNDING), _spread(loads))
    best = _timed(problem, current)
    budget = max(_LEAST_TIMED, PASSES // max(1, sum(map(len, problem.schedule.actions))))
    seen = {tuple(current)}
    moved = True
    while moved and budget > 0:
        moved = False
        near = [candidate for candidate in _near(problem, current, optimum * (1 + TOLERANCE)) if tuple(candidate[1]) not in seen]
        for _, other in sorted(near)[:budget]:
            budget -= 1
            seen.add(tuple(other))
            seconds = _timed(problem, other)
            if seconds < best * (1 - _ROUNDING):
                current, best, moved = other, seconds, True
                break
    return current


def _near(problem: Problem, pieces: list[Piece], bottleneck: float) -> Iterator[tuple[float, list[Piece]]]:
    """Yields (spread, pieces) of splits whose bottleneck is at most `bottleneck`: those one move away or, if there are few, all."""
    units, stages = problem.units, len(pieces)
    few = comb(units - 1, stages - 1) <= _FEW
    for other in _every(units, stages) if few else _neighbours(pieces):
        loads = _loads(problem, other)
        if loads and _bottleneck(loads) <= bottleneck:
            yield _spread(loads), other


def _timed(problem: Problem, pieces: list[Piece]) -> float:
    forecast = forecast_split(problem, pieces).forecast
    assert forecast is not None
    return forecast.step_seconds


def _even(problem: Problem, pieces: list[Piece], bottleneck: float, spread: float) -> list[Piece]:
    """Returns a split in which ranks and stages are as even as single moves can make them and all ranks stay within `bottleneck`;
    `spread` is the unevenness of `pieces`."""
    current, budget = pieces, _EVENING
    moved = True
    while moved and budget > 0:
        moved = False
        for other in _neighbours(current):
            budget -= 1
            loads = _loads(problem, other)
            if loads and _bottleneck(loads) <= bottleneck and _spread(loads) < spread * (1 - _ROUNDING):
                current, spread, moved = other, _spread(loads), True
                break
    return current


def _loads(problem: Problem, pieces: list[Piece]) -> list[RankCost] | None:
    """Returns the cost of every rank for `pieces`, by stage; None if a rank exceeds its memory cap."""
    costs = [problem.cost(rank, mine) for rank, mine in enumerate(by_rank(problem, pieces))]
    return None if None in costs else [cost for cost in costs if cost is not None]


def _bottleneck(loads: list[RankCost]) -> float:
    return max(cost.seconds for cost in loads)


def _spread(loads: list[RankCost]) -> float:
    """Returns a measure of unevenness: the sum of squared seconds of the ranks and of their stages."""
    return sum(cost.seconds**2 + sum(seconds**2 for seconds in cost.stage_seconds) for cost in loads)


def _every(units: int, stages: int) -> Iterator[list[Piece]]:
    for cuts in combinations(range(1, units), stages - 1):
        yield list(pairwise((0, *cuts, units)))


def _neighbours(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Yields splits with one layer less at a stage and one more at another, with the stages between shifted, near stages first;
    then splits with two borders moved by one layer each, in the same or in opposite directions."""
    borders = [pieces[0][0], *(end for _, end in pieces)]
    inner = range(1, len(pieces))
    moves: list[tuple[Sequence[int], tuple[int, ...]]] = []
    for length in inner:
        starts = inner[: len(inner) - length + 1]
        moves += [(range(start, start + length), (by,) * length) for start in starts for by in (-1, 1)]
    for pair in combinations_with_replacement(inner, 2):
        moves += [(pair, ways) for ways in product((-1, 1), repeat=2)]
    for moved, ways in moves:
        after = borders.copy()
        for border, by in zip(moved, ways, strict=True):
            after[border] += by
        if after != borders and all(a < b for a, b in pairwise(after)):
            yield list(pairwise(after))
