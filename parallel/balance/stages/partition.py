"""Finds the split with the least bottleneck, the time of its slowest rank. It is exact and works for any placement of stages.

The search goes through the ranks in order; each rank takes a piece, a range of units (layers, or half layers), for every one of its
stages. The remaining units form a gap for each chunk or, in a V, for every two chunks, which take from both ends of it:

    one chunk        rank 0 takes [0, a), rank 1 [a, b), ...                     left: one gap
    V                rank 0 takes [0, a) and [z, L), rank 1 [a, b) and [y, z)    left: one gap between
    interleaved      rank 0 takes [0, a) and [m, n), rank 1 [a, b) and [n, o)    left: two gaps; m, where the second chunk begins,
                                                                                 is tried near the middle first

The best split of the remaining gaps over ranks r, r + 1, ... does not depend on how the gaps came about, so it is computed once
(dynamic programming). With one chunk, this takes O(ranks x units^2) steps (Bellman's min-max partition). With more chunks there
are more states, and bounds keep them few: a rank never takes more than the bottleneck `bound` allows, nor so little that the later
ranks, all filled up to the bound (`_Room`), could not hold the rest. The search begins with the lowest bound under which all units
have room, which usually has a split, and raises it until a split exists. A second search, below that split's bottleneck, then finds
the optimum or proves that there is nothing better.

Placements of more than two chunks can have too many states. Then the limit `WORK` ends the proof but not the search: it returns the
first split found under the lowest bound that yields one, and `Solution` states how far it can be from the optimum.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from math import inf
from operator import add

from bagualu.parallel.balance.stages.problem import Piece, Problem

WORK = 200_000
"""Number of choices that each search may examine before it stops: about a second, or a few seconds if there are memory caps."""
_STEPS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, inf)
"""Bounds of the bottleneck to try one after the other, as fractions above the lowest possible bound."""
_ROUNDING = 1e-9
_SUMS = 200_000

Gaps = tuple[Piece, ...]
"""The ranges of units that no rank has taken yet."""


@dataclass(frozen=True)
class Solution:
    pieces: list[Piece]
    """The units of each stage, in the order of the model."""
    bottleneck_seconds: float
    least_possible_seconds: float
    """A proven lower bound of the bottleneck of any split. It equals the bottleneck if this split is proven to be optimal."""

    @property
    def proven(self) -> bool:
        return self.least_possible_seconds >= self.bottleneck_seconds * (1 - 2 * _ROUNDING)


class GaveUp(Exception):
    """The search reached its limit of work before it found a split or could prove that none fits."""


def solve(problem: Problem, work: int = WORK) -> Solution | None:
    """Returns the split of least bottleneck, or the best found if a search of `work` choices did not suffice to prove it best; None
    if no split fits the caps. Raises GaveUp if the searches found no split but could not prove that none fits."""
    room = _Room(problem)
    least = _least_bound(room)
    if least is None:
        return None
    floor, proves = least, True
    for step in _STEPS:
        bound = max(least, 1e-300) * (1 + step)  # positive even if all costs are 0
        try:
            split = _Search(room, bound, bound, work).run()
        except _TooMuchWork:
            proves = False
            continue
        if split is not None:
            return _improved(room, split, floor, proves, work)
        floor = bound if proves else floor
    if not proves:
        raise GaveUp
    return None


def _improved(room: "_Room", split: tuple[float, list[Piece]], floor: float, proves: bool, work: int) -> Solution:
    """Returns the best split, given a first `split` and a lower bound `floor` of the bottleneck.

    Searches further only if the bottleneck of `split` is above `floor` and no earlier search was cut short (`proves`).
    """
    value, pieces = split
    if value > floor * (1 + _ROUNDING) and proves:
        try:
            better = _Search(room, value * (1 - 2 * _ROUNDING), floor, work).run()
        except _TooMuchWork:
            return Solution(pieces, value, floor)
        value, pieces = better or (value, pieces)
        floor = value
    return Solution(pieces, value, min(floor, value))


class _TooMuchWork(Exception):
    pass


class _Room:
    """The most seconds of units, at speed 1.0, that each rank can take under a given bottleneck."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        seconds = problem.least_seconds()
        self.total = sum(seconds)
        self.most_units = [_most_units(problem, rank) for rank in range(problem.placement.ranks)]
        longest = list(accumulate(sorted(seconds, reverse=True), initial=0.0))
        self._most_seconds = [longest[most] for most in self.most_units]
        self.edges = [problem.edge_seconds(rank) for rank in range(problem.placement.ranks)]
        self._sums = _sums_of_runs(seconds, problem.placement.chunks)

    def limit(self, rank: int, bound: float) -> float:
        return bound * (1 + _ROUNDING) * self.problem.speeds[rank] - self.edges[rank]

    def at_most(self, rank: int, bound: float) -> float:
        """Returns the most seconds of units, at speed 1.0, within `bound`; negative if the rank exceeds `bound` even without
        units."""
        limit = self.limit(rank, bound)
        if self._sums is not None and limit >= 0:
            limit = self._sums[bisect_right(self._sums, limit) - 1]
        return min(limit, self._most_seconds[rank])

    def suffices(self, bound: float) -> bool:
        rooms = [self.at_most(rank, bound) for rank in range(self.problem.placement.ranks)]
        return min(rooms) >= 0 and sum(rooms) >= self.total * (1 - _ROUNDING)


def _most_units(problem: Problem, rank: int) -> int:
    """Returns how many units fit into a rank's memory if they are the smallest units."""
    if problem.caps is None:
        return problem.units
    sizes = accumulate(sorted(problem.least_memory(rank)))
    return sum(size <= problem.caps[rank] + problem.activations.offload_bytes for size in sizes)


def _sums_of_runs(seconds: list[float], runs: int) -> list[float] | None:
    """Returns every total of seconds that `runs` runs of consecutive units can have, sorted; None if computing them would take too
    long.

    Layers of equal seconds are counted instead of added, so that the order of the units does not change a total.
    """
    kinds = sorted(set(seconds))
    one_run = {(0,) * len(kinds)}
    for first in range(len(seconds)):
        counts = [0] * len(kinds)
        for taken in seconds[first:]:
            counts[kinds.index(taken)] += 1
            one_run.add(tuple(counts))
    totals = {(0,) * len(kinds)}
    for _ in range(runs):
        if len(totals) * len(one_run) > _SUMS:
            return None
        totals = {tuple(map(add, a, b)) for a in totals for b in one_run}
    sums = sorted(sum(n * kind for n, kind in zip(counts, kinds, strict=True)) for counts in totals)
    return [total * (1 + _ROUNDING / 2) for total in sums]  # because other orders of addition round differently


def _least_bound(room: _Room) -> float | None:
    """Returns the lowest bottleneck at which the ranks have room for all units, ignoring the units' order; None if the memory
    caps leave too little room at any bottleneck."""
    low, high = 0.0, (room.total + sum(room.edges)) / min(room.problem.speeds)
    if sum(room.most_units) < room.problem.units or not room.suffices(high):
        return None
    while high - low > high * _ROUNDING / 4:
        middle = (low + high) / 2
        low, high = (low, middle) if room.suffices(middle) else (middle, high)
    return high


class _Search:
    """Finds the best split with a bottleneck of at most `bound`; stops at a split with a bottleneck of at most `enough`."""

    def __init__(self, room: _Room, bound: float, enough: float, work: int) -> None:
        self.room, self.problem, self.placement = room, room.problem, room.problem.placement
        self.enough, self.work = enough, work
        self.left_seconds = list(accumulate(self.problem.least_seconds(), initial=0.0))
        self._bound_by(bound)
        pairs, chunks = self.placement.v_shaped, self.placement.chunks
        self.gap_of = [chunk // 2 if pairs else chunk for chunk in range(chunks)]
        self.eaters = [self.gap_of.count(gap) for gap in range(self.gap_of[-1] + 1)]
        self.known: dict[tuple[int, Gaps], tuple[float, tuple[Piece, ...], Gaps]] = {}

    def run(self) -> tuple[float, list[Piece]] | None:
        """Returns (bottleneck in seconds, pieces by stage); None if no split that fits the caps is within the bound. Raises
        _TooMuchWork."""
        best, start = inf, None
        for gaps in self._starts():
            value = self._best(0, gaps) if self.possible else inf
            if value < best:
                best, start = value, gaps
                self._bound_by(best * (1 - 2 * _ROUNDING))
            if best <= self.enough * (1 + _ROUNDING) or not self.possible:
                break
        return None if start is None else (best, self._pieces(start))

    def _bound_by(self, bound: float) -> None:
        """Restricts the search to splits with a bottleneck of at most `bound`. Bounds only fall, so earlier results stay valid."""
        ranks = range(self.placement.ranks)
        self.bound, self.possible = bound, self.room.suffices(bound)
        self.limits = [self.room.limit(rank, bound) for rank in ranks]
        self.most_units = self.room.most_units
        room, units = ([0.0] * len(ranks), [0] * len(ranks))
        for rank in reversed(ranks[:-1]):
            room[rank] = room[rank + 1] + self.room.at_most(rank + 1, bound)
            units[rank] = units[rank + 1] + self.most_units[rank + 1]
        self.later, self.later_units = room, units

    def _starts(self) -> Iterator[Gaps]:
        """Yields the possible gaps before rank 0 takes its pieces, those of most equal size first."""
        ranks, units = self.placement.ranks, self.problem.units
        needs = [eaters * ranks for eaters in self.eaters]
        even = [units * need // sum(needs) for need in accumulate(needs)][:-1]
        for distance in range(units):
            around = range(-distance, distance + 1)
            for moves in product(around, repeat=len(even)):
                borders = [0, *(e + m for e, m in zip(even, moves, strict=True)), units]
                self._work()
                if max(map(abs, moves), default=0) == distance and all(
                    b - a >= need for a, b, need in zip(borders, borders[1:], needs, strict=False)
                ):
                    yield tuple(pairwise(borders))
            if not even:
                return

    def _best(self, rank: int, gaps: Gaps) -> float:
        """Returns the least bottleneck, over the ranks from `rank` on, with which these ranks can take all of `gaps`; inf if no way
        is within the bound. Stops at the first way whose bottleneck is at most `enough`."""
        if rank == self.placement.ranks:
            return 0.0
        if (rank, gaps) in self.known:
            return self.known[rank, gaps][0]
        best: tuple[float, tuple[Piece, ...], Gaps] = (inf, (), ())
        for pieces, rest in self._choices(rank, gaps):
            cost = self.problem.cost(rank, pieces)
            if cost is None or cost.seconds > self.bound * (1 + _ROUNDING) or cost.seconds >= best[0]:
                continue
            value = max(cost.seconds, self._best(rank + 1, rest))
            if value < best[0]:
                best = (value, pieces, rest)
            if best[0] <= self.enough * (1 + _ROUNDING):
                break
        self.known[rank, gaps] = best
        return best[0]

    def _choices(self, rank: int, gaps: Gaps) -> list[tuple[tuple[Piece, ...], Gaps]]:
        """Returns the (pieces, remaining gaps) that `rank` may choose: first those that leave the later ranks nearest to their fair
        share, and among them those with the most even stages."""
        left = sum(self.left_seconds[b] - self.left_seconds[a] for a, b in gaps)
        if sum(b - a for a, b in gaps) > self.most_units[rank] + self.later_units[rank]:
            return []
        speeds = self.problem.speeds[rank:]
        aim = left * speeds[0] / sum(speeds)
        choices = list(self._take(rank, gaps, 0, 0.0, left - self.later[rank] - left * _ROUNDING))
        choices.sort(key=lambda choice: (abs(choice[0] - aim), sum((b - a) ** 2 for a, b in choice[1])))
        return [(pieces, rest) for _, pieces, rest in choices]

    def _take(
        self, rank: int, gaps: Gaps, chunk: int, taken: float, least: float
    ) -> Iterator[tuple[float, tuple[Piece, ...], Gaps]]:
        """Yields (seconds at speed 1.0, pieces, gaps afterwards) for every way to take pieces for the chunks from `chunk` on."""
        self._work()
        if chunk == self.placement.chunks:
            yield taken, (), gaps
            return
        gap = self.gap_of[chunk]
        for piece, rest in self._cuts(rank, gaps[gap], chunk, self.limits[rank] - taken, least - taken):
            after = (*gaps[:gap], rest, *gaps[gap + 1 :])
            seconds = taken + self.left_seconds[piece[1]] - self.left_seconds[piece[0]]
            for total, pieces, end in self._take(rank, after, chunk + 1, seconds, least):
                yield total, (piece, *pieces), end

    def _cuts(self, rank: int, gap: Piece, chunk: int, most: float, least: float) -> Iterator[tuple[Piece, Piece]]:
        """Yields (piece, rest of the gap) for a chunk that takes at most `most` seconds and, if it is the rank's last chunk, at
        least `least`."""
        low, high = gap
        sums, last = self.left_seconds, chunk + 1 == self.placement.chunks
        down = self.placement.v_shaped and chunk % 2 == 1
        shared = chunk + 1 < self.placement.chunks and self.gap_of[chunk + 1] == self.gap_of[chunk]
        keep = shared + self.eaters[self.gap_of[chunk]] * (self.placement.ranks - 1 - rank)
        if down:
            first, final = max(low + keep, bisect_left(sums, sums[high] - most * (1 + _ROUNDING))), high - 1
            final = min(final, bisect_right(sums, sums[high] - least) - 1) if last else final
        else:
            first, final = low + 1, min(high - keep, bisect_right(sums, sums[low] + most * (1 + _ROUNDING)) - 1)
            first = max(first, bisect_left(sums, sums[low] + least)) if last else first
        if keep == 0:  # no other chunk takes from this gap later, so this piece is all of it
            first, final = (max(first, low), min(final, low)) if down else (max(first, high), final)
        for cut in range(first, final + 1):
            yield ((cut, high), (low, cut)) if down else ((low, cut), (cut, high))

    def _pieces(self, gaps: Gaps) -> list[Piece]:
        by_stage: dict[int, Piece] = {}
        for rank in range(self.placement.ranks):
            _, pieces, gaps = self.known[rank, gaps]
            by_stage |= zip(self.problem.stages_of[rank], pieces, strict=True)
        return [by_stage[stage] for stage in range(self.placement.stages)]

    def _work(self) -> None:
        self.work -= 1
        if self.work < 0:
            raise _TooMuchWork
