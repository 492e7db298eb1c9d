"""Finds the layouts with the shortest steps among those that fit, best first.

An estimate is cheap, a prediction of memory costs more, and an exact prediction of the step most. So layouts come in the order of
their estimates, from a heap that also holds degrees whose layouts have not been estimated yet, with a lower bound of their steps.
Memory is predicted in that order, until enough layouts fit. Recomputation, which only makes a step longer, is considered where a
layout does not fit without it. The first that fit are then predicted exactly, which decides their order. What other choices cost is
seen from layouts that differ from the best in one of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count, takewhile
from typing import Generic, Protocol, TypeVar

from bagualu.parallel.planner.layouts import (
    Degrees,
    PlannedLayout,
    SearchSpace,
    degrees,
    heavier,
    layouts,
    leanest,
    neighbours,
    recomputes,
    without_sequence,
)

Exact = TypeVar("Exact", bound="ExactCost")
_MOST_UNEQUAL = 12
"""The number of layouts for which unequal stages are tried before it is said that none fits."""
_EXTRA = 1.2
"""Variations of the best layouts may take this much longer than estimates."""
_AFTER = 1.1
"""What other choices cost may take this much longer than exact predictions."""
ExactOf = TypeVar("ExactOf", bound="ExactCost", covariant=True)


class ExactCost(Protocol):
    """An exact prediction."""

    @property
    def step_seconds(self) -> float: ...


@dataclass(frozen=True)
class StepParts:
    """The estimated seconds of a step by cause, which add up to the step."""

    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Need:
    """The memory that a layout needs."""

    bytes: int
    """On the rank that needs most."""
    excess_bytes: int
    """How much more than its device has a rank needs at the most; at most 0 for a layout that fits."""
    filled: float = 1.0
    """What all ranks need of the memory of all devices: if it is more than 1, another split of the layers hardly fits either."""


class Costs(Protocol[ExactOf]):
    """What layouts cost."""

    def least_seconds(self, of: Degrees) -> float:
        """Returns a lower bound of the estimates of all layouts of these degrees."""
        ...

    def estimate(self, layout: PlannedLayout) -> StepParts | None:
        """Returns the estimate of a step; None if the recipe cannot run in this layout."""
        ...

    def need(self, layout: PlannedLayout) -> Need | None:
        """Returns the predicted memory; None if the recipe cannot run in this layout."""
        ...

    def variations(self, layout: PlannedLayout) -> Iterable[PlannedLayout]:
        """Yields layouts that differ in what the enumeration leaves alone: the split of layers, the shares of data ranks."""
        ...

    def fitted(self, layout: PlannedLayout) -> PlannedLayout | None:
        """Returns `layout` with unequal stages with which it fits; None if none were found, or it may not have them."""
        ...

    def exact(self, layout: PlannedLayout) -> tuple[ExactOf, Need]:
        """Returns the exact prediction, and the memory that it has."""
        ...


@dataclass(frozen=True)
class RankedLayout(Generic[Exact]):
    """A layout with what is known of its cost."""

    layout: PlannedLayout
    parts: StepParts
    need: Need
    exact: Exact | None = None

    @property
    def fits(self) -> bool:
        return self.need.excess_bytes <= 0


@dataclass
class Plan(Generic[Exact]):
    """The result of a search."""

    ranked: list[RankedLayout[Exact]] = field(default_factory=list)
    """Those that were predicted exactly, best first."""
    others: list[RankedLayout[Exact]] = field(default_factory=list)
    """Others whose memory was predicted, in the order of their estimates: some fit, some do not."""
    estimated: int = 0
    """The number of layouts whose step was estimated."""
    complete: bool = True
    """Whether all layouts were estimated that could be better than those of the result."""


@dataclass(frozen=True)
class Effort:
    """How long a search goes on."""

    fitting: int = 16
    """The number of layouts that fit among which the exact prediction decides."""
    estimate_seconds: float = 25.0
    """After this time no further layout is estimated."""
    total_seconds: float = 50.0
    """No further layout is predicted exactly if that may end after this time."""
    most_exact: int = 12
    least_exact: int = 5
    """So many are predicted exactly if there is time, whatever their estimates."""
    near: float = 1.25
    """Beyond these, layouts whose estimate exceeds the least by more than this factor are not predicted exactly."""


def leanest_need(space: SearchSpace, costs: Costs[Exact]) -> tuple[PlannedLayout, Need] | None:
    """Returns a layout that fits, with equal stages if there is one; if none does, that which exceeds its devices least; None if
    none can run."""
    needs: list[tuple[PlannedLayout, Need]] = []
    for layout in leanest(space):
        if (need := costs.need(layout)) is not None:
            needs.append((layout, need))
            if need.excess_bytes <= 0:
                return layout, need
    tried = sorted((one for one in needs if one[1].filled <= 1), key=lambda one: one[1].filled)[:_MOST_UNEQUAL]
    for layout, _ in tried:
        if (found := costs.fitted(layout)) and (need := costs.need(found)) and need.excess_bytes <= 0:
            return found, need
    return min(needs, key=lambda one: one[1].excess_bytes, default=None)


def search(
    space: SearchSpace,
    costs: Costs[Exact],
    effort: Effort,
    now: Callable[[], float],
    known: Iterable[PlannedLayout] = (),
) -> Plan[Exact]:
    """Returns the best layouts of `space`. `now` returns the time in seconds. `known`: layouts that fit, which are compared with
    those that are found. The result has no `ranked` layouts if none fits."""
    start = now()
    walk = _Walk(space, costs, effort, lambda: now() - start)
    walk.run()
    for layout in known:
        walk.known(layout)
    fitting = sorted((one for one in walk.seen.values() if one.fits), key=lambda one: one.parts.total)
    in_time = takewhile(lambda _: now() - start <= effort.estimate_seconds * _EXTRA, fitting[: effort.most_exact])
    fitting = fitting + [one for layout in in_time for one in walk.varied(layout.layout) if one.fits]
    fitting.sort(key=lambda one: one.parts.total)
    ranked, too_large = _predicted(fitting, costs, effort, lambda: now() - start)
    ranked.sort(key=_exact_seconds)
    done = {one.layout for one in ranked}
    changes = takewhile(
        lambda _: now() - start <= effort.total_seconds * _AFTER, neighbours(space, ranked[0].layout) if ranked else ()
    )
    changed = [found for other in changes if (found := walk.known(other))]
    others = {one.layout: one for one in [*walk.seen.values(), *fitting, *changed, *too_large] if one.layout not in done}
    by_estimate = sorted(others.values(), key=lambda one: one.parts.total)
    return Plan(ranked, by_estimate, walk.estimated, walk.complete)


def _predicted(
    fitting: Sequence[RankedLayout[Exact]], costs: Costs[Exact], effort: Effort, elapsed: Callable[[], float]
) -> tuple[list[RankedLayout[Exact]], list[RankedLayout[Exact]]]:
    """Returns the first of the layouts that were found to fit with their exact predictions: those that do fit, and those that do
    not."""
    ranked: list[RankedLayout[Exact]] = []
    too_large: list[RankedLayout[Exact]] = []
    longest = 0.0
    for one in fitting:
        begun = elapsed()
        late, far = begun + longest > effort.total_seconds, one.parts.total > effort.near * fitting[0].parts.total
        if len(ranked) == effort.most_exact or (ranked and late) or (len(ranked) >= effort.least_exact and far):
            break
        exact, need = costs.exact(one.layout)
        longest = max(longest, elapsed() - begun)
        found = replace(one, exact=exact, need=need)
        (ranked if found.fits else too_large).append(found)
    return ranked, too_large


def _exact_seconds(one: RankedLayout[Exact]) -> float:
    assert one.exact is not None
    return one.exact.step_seconds


class _Walk(Generic[Exact]):
    """Goes through layouts in the order of their estimates and predicts their memory."""

    def __init__(self, space: SearchSpace, costs: Costs[Exact], effort: Effort, elapsed: Callable[[], float]) -> None:
        self.seen: dict[PlannedLayout, RankedLayout[Exact]] = {}
        self.estimated = 0
        self.complete = True
        self._space, self._costs, self._effort, self._elapsed = space, costs, effort, elapsed
        self._numbers = count()
        self._heap: list[tuple[float, int, Degrees | tuple[PlannedLayout, StepParts]]] = []
        self._fitting = 0
        self._too_large: dict[object, list[PlannedLayout]] = {}
        """Layouts that do not fit, by what must be equal for `_needs_as_much`."""
        self._smallest: dict[object, int] = {}
        """The smallest micro-batch, by `_division`."""
        self._refitted: dict[PlannedLayout, PlannedLayout | None] = {}
        """For layouts with equal stages that do not fit, those with unequal stages that do."""
        self._may: dict[object, bool] = {}
        """Whether the layout that needs least memory fits, by structure and ZeRO stage."""
        self._bases: dict[PlannedLayout, PlannedLayout] = {}
        """The layouts that were estimated, with those of which they are variations, or themselves."""

    def run(self) -> None:
        self._begin()
        while self._heap and not self._enough:
            if self._elapsed() > self._effort.estimate_seconds and self._fitting:
                self.complete = self.complete and self._enough
                return
            _, _, node = heappop(self._heap)
            if isinstance(node, Degrees):
                self._estimate_all(one for one in layouts(self._space, node) if one.recompute == recomputes(self._space)[0])
            elif self._tells(node[0]) and self._may_fit(node[0]) and self._see(*node):
                self._fitting += 1
            else:
                self._replace(node[0])

    def varied(self, layout: PlannedLayout) -> Iterator[RankedLayout[Exact]]:
        """Yields the variations of a layout with their costs."""
        for other in (*self._costs.variations(layout), *without_sequence(self._space, layout)):
            if (found := self.known(other)) is not None:
                yield found

    def known(self, layout: PlannedLayout) -> RankedLayout[Exact] | None:
        """Returns a layout with its costs; None if the recipe cannot run in it."""
        if layout not in self.seen:
            parts, need = self._costs.estimate(layout), self._costs.need(layout)
            if parts is None or need is None:
                return None
            self.estimated += 1
            self.seen[layout] = RankedLayout(layout, parts, need)
        return self.seen[layout]

    @property
    def _enough(self) -> bool:
        return self._fitting >= self._effort.fitting

    def _begin(self) -> None:
        for of in degrees(self._space):
            if self._elapsed() > self._effort.estimate_seconds / 2:
                self.complete = False
                break
            self._push(self._costs.least_seconds(of), of)
            division = _division(of)
            self._smallest[division] = min(of.micro_batch, self._smallest.get(division, of.micro_batch))

    def _push(self, seconds: float, node: Degrees | tuple[PlannedLayout, StepParts]) -> None:
        heappush(self._heap, (seconds, next(self._numbers), node))

    def _estimate_all(self, found: Iterable[PlannedLayout]) -> None:
        for layout in found:
            if self._space.unequal or self._tells(layout):  # unequal stages may fit where equal ones do not
                self._estimate(layout)

    def _estimate(self, layout: PlannedLayout) -> None:
        for candidate in (layout, *(self._costs.variations(layout) if self._space.unequal else ())):
            if candidate not in self._bases and (parts := self._costs.estimate(candidate)) is not None:
                self._bases[candidate] = layout
                self.estimated += 1
                self._push(parts.total, (candidate, parts))

    def _replace(self, layout: PlannedLayout) -> None:
        """Adds what may fit in place of `layout`, which does not: more recomputation and, on a mixed cluster, unequal stages."""
        even = self._bases[layout]
        self._estimate_all(heavier(self._space, even))
        if self._space.unequal:
            self._refit(even)

    def _refit(self, even: PlannedLayout) -> None:
        """Adds `even`, which has equal stages and does not fit, with unequal stages with which it fits, if the layout with the same
        structure and ZeRO stage that needs least memory has such stages."""
        lean = replace(even, degrees=self._with_least(even.degrees), recompute=recomputes(self._space)[-1])
        for one in (lean, even):
            if one not in self._refitted:
                self._refitted[one] = self._costs.fitted(one)
                if (found := self._refitted[one]) is not None:
                    self._estimate(found)
            if self._refitted[one] is None:
                return

    def _tells(self, layout: PlannedLayout) -> bool:
        """Returns whether `layout` may fit, as far as those tell that were found not to."""
        return not any(_needs_as_much(layout, other) for other in self._too_large.get(_structure(layout), ()))

    def _may_fit(self, layout: PlannedLayout) -> bool:
        """Returns whether the layout with the same structure and ZeRO stage that needs least memory fits."""
        key = _structure(layout), layout.zero, layout.shares
        if key not in self._may:
            lean = replace(layout, degrees=self._with_least(layout.degrees), recompute=recomputes(self._space)[-1])
            alone = layout.shares is not None or lean == layout
            parts = None if alone else self._costs.estimate(lean)
            self._may[key] = parts is None or self._see(lean, parts)
        return self._may[key]

    def _with_least(self, of: Degrees) -> Degrees:
        return replace(of, micro_batch=self._smallest[_division(of)])

    def _see(self, layout: PlannedLayout, parts: StepParts) -> bool:
        """Predicts the memory of `layout`; returns whether it fits."""
        if layout not in self.seen:
            if (need := self._costs.need(layout)) is None:
                return False
            self.seen[layout] = RankedLayout(layout, parts, need)
            if not self.seen[layout].fits:
                self._too_large.setdefault(_structure(layout), []).append(layout)
        return self.seen[layout].fits


def _division(of: Degrees) -> object:
    return of.data, of.tensor, of.pipeline, of.expert, of.sequence


def _structure(layout: PlannedLayout) -> object:
    return _division(layout.degrees), layout.schedule, layout.virtual_stages, layout.balance


_LIGHTER = {"none": ("attention", "experts", "every:4", "every:2", "full"), "every:4": ("every:2", "full"), "every:2": ("full",),
            "attention": ("full",), "experts": ("full",)}  # fmt: skip
"""For each value of train.recompute, those that take less memory whatever the model."""


def _needs_as_much(layout: PlannedLayout, other: PlannedLayout) -> bool:
    """Returns whether `layout` needs at least as much memory as `other`, which has the same structure."""
    return (
        layout.degrees.micro_batch >= other.degrees.micro_batch
        and (layout.zero or 0) <= (other.zero or 0)
        and (layout.recompute == other.recompute or other.recompute in _LIGHTER.get(str(layout.recompute), ()))
        and layout.shares == other.shares
    )


def slower_by(one: StepParts, other: StepParts) -> list[tuple[str, float]]:
    """Returns by how many seconds each part of a step is longer in `one` than in `other`, the longest first, without those that are
    shorter."""
    parts = one.seconds.keys() | other.seconds.keys()
    differences = [(part, one.seconds.get(part, 0.0) - other.seconds.get(part, 0.0)) for part in parts]
    return sorted(((part, by) for part, by in differences if by > 0), key=lambda pair: (-pair[1], pair[0]))
