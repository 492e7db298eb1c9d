"""From a split of least bottleneck to the one that the schedule runs fastest. Free of torch.

The bottleneck alone says nothing of the time in which the pipeline fills and drains, nor of the other ranks, and many splits share
it. So splits near the optimum are timed on the schedule itself. The rule: of the splits timed whose bottleneck is at most
`TOLERANCE` above the optimum, the one of least predicted step time; among equals the one found first, which is the evener one.

Splits are found by moving a layer from any stage to any other or two borders by a layer, first to make ranks and stages even, then
to lower the time; where there are few splits, all of them are looked at.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, combinations_with_replacement, pairwise, product
from math import comb

from bagualu.parallel.balance.forecast import by_rank, forecast_split
from bagualu.parallel.balance.problem import Piece, Problem, RankCost

TOLERANCE = 0.03
PASSES = 60_000
"""Passes of the schedule that may be timed in all, about a second."""
_LEAST_TIMED = 6
_EVENING = 20_000
_FEW = 2_000
_ROUNDING = 1e-9


def refine(problem: Problem, pieces: list[Piece]) -> list[Piece]:
    """`pieces`, by stage, is a split of least bottleneck; the answer follows the rule above."""
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
        near = [one for one in _near(problem, current, optimum * (1 + TOLERANCE)) if tuple(one[1]) not in seen]
        for _, other in sorted(near)[:budget]:
            budget -= 1
            seen.add(tuple(other))
            seconds = _timed(problem, other)
            if seconds < best * (1 - _ROUNDING):
                current, best, moved = other, seconds, True
                break
    return current


def _near(problem: Problem, pieces: list[Piece], bottleneck: float) -> Iterator[tuple[float, list[Piece]]]:
    """(spread, pieces) of the splits one move away, or of all where there are few, that stay below the bottleneck."""
    layers, stages = problem.layers, len(pieces)
    few = comb(layers - 1, stages - 1) <= _FEW
    for other in _every(layers, stages) if few else _neighbours(pieces):
        loads = _loads(problem, other)
        if loads and _bottleneck(loads) <= bottleneck:
            yield _spread(loads), other


def _timed(problem: Problem, pieces: list[Piece]) -> float:
    forecast = forecast_split(problem, pieces).forecast
    assert forecast is not None
    return forecast.step_seconds


def _even(problem: Problem, pieces: list[Piece], bottleneck: float, spread: float) -> list[Piece]:
    """Move layers while that brings the ranks nearer to each other and none above the bottleneck."""
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
    """What every rank pays; None when one does not fit its cap."""
    costs = [problem.cost(rank, mine) for rank, mine in enumerate(by_rank(problem, pieces))]
    return None if None in costs else [cost for cost in costs if cost is not None]


def _bottleneck(loads: list[RankCost]) -> float:
    return max(cost.seconds for cost in loads)


def _spread(loads: list[RankCost]) -> float:
    """The less, the more even: squares of what ranks take, and where a rank has several stages, of what those take."""
    return sum(cost.seconds**2 + sum(seconds**2 for seconds in cost.stage_seconds) for cost in loads)


def _every(layers: int, stages: int) -> Iterator[list[Piece]]:
    for cuts in combinations(range(1, layers), stages - 1):
        yield list(pairwise((0, *cuts, layers)))


def _neighbours(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """One layer less at one stage, one more at another, those between moved along, near ones first; then two borders that move by
    one layer each, the same or another way."""
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
