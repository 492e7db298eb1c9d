"""The search over made-up costs: it finds the best that fits, asks for few memories and fewer exact predictions, and keeps its
budgets of time."""

from dataclasses import dataclass, replace

import pytest

from bagualu.parallel.planner.layouts import SearchSpace, degrees, layouts, neighbours
from bagualu.parallel.planner.search import Effort, Need, StepParts, leanest_need, search, slower_by

SPACE = SearchSpace(
    world=16, layers=8, widths=(8, 8), experts=0, global_batch=32, sequence_length=64, most_tensor=8, zero_stages=(1, 2, 3)
)
_RECOMPUTE = {"none": 0, "attention": 1, "every:4": 2, "every:2": 3, "full": 4}


@dataclass(frozen=True)
class Predicted:
    step_seconds: float


class MadeUp:
    """Steps are shorter with less recomputation and larger micro-batches, which take more memory."""

    limit = 1000
    wrong = 1.0
    """The factor by which exact predictions of the layouts with recomputation differ from their estimates."""

    def __init__(self):
        self.estimates, self.needs, self.exacts = [], [], []

    def least_seconds(self, of):
        return 10 / of.micro_batch + of.pipeline + of.tensor

    def parts(self, layout):
        of = layout.degrees
        return {"kernels": self.least_seconds(of), "recomputation": _RECOMPUTE[layout.recompute] / 10, "update": layout.zero / 100}

    def estimate(self, layout):
        self.estimates.append(layout)
        return StepParts(self.parts(layout))

    def bytes(self, layout):
        of = layout.degrees
        return 4000 * of.micro_batch // ((1 + _RECOMPUTE[layout.recompute]) * of.tensor * of.pipeline) + 100 // layout.zero

    def need(self, layout):
        self.needs.append(layout)
        return Need(self.bytes(layout), self.bytes(layout) - self.limit)

    def variations(self, layout):
        return ()

    def fitted(self, layout):
        return None

    def exact(self, layout):
        self.exacts.append(layout)
        seconds = StepParts(self.parts(layout)).total * (self.wrong if layout.recompute != "none" else 1)
        return Predicted(seconds), self.need(layout)


class Clock:
    def __init__(self, tick):
        self.time, self.tick = 0.0, tick

    def __call__(self):
        self.time += self.tick
        return self.time


def best_by_hand(costs, space=SPACE):
    every = [layout for of in degrees(space) for layout in layouts(space, of)]
    fitting = [layout for layout in every if costs.bytes(layout) <= costs.limit]
    return min(StepParts(costs.parts(layout)).total for layout in fitting), len(every)


def test_the_best_layout_that_fits_comes_first():
    costs = MadeUp()
    plan = search(SPACE, costs, Effort(), Clock(0))
    seconds, every = best_by_hand(costs)
    assert plan.ranked[0].exact.step_seconds == pytest.approx(seconds)
    assert all(one.fits for one in plan.ranked)
    assert [one.exact.step_seconds for one in plan.ranked] == sorted(one.exact.step_seconds for one in plan.ranked)
    assert plan.complete
    assert plan.estimated < every / 2
    assert len(costs.needs) < every / 2
    assert len(costs.exacts) <= Effort.most_exact


def test_exact_predictions_decide_the_order():
    costs = MadeUp()
    costs.wrong = 0.5
    plan = search(SPACE, costs, replace(Effort(), near=2.0), Clock(0))
    assert plan.ranked[0].layout.recompute != "none"


def test_some_layouts_are_predicted_whatever_their_estimates():
    for least in (1, 5):  # with this `near`, all estimates are too far from the least
        plan = search(SPACE, MadeUp(), Effort(near=0.0, least_exact=least), Clock(0))
        assert len(plan.ranked) == least


def test_a_layout_that_the_exact_prediction_does_not_fit_is_not_proposed():
    class Stricter(MadeUp):
        def exact(self, layout):
            predicted, need = super().exact(layout)
            return predicted, replace(need, excess_bytes=1 if layout.schedule == "1f1b" else need.excess_bytes)

    plan = search(SPACE, Stricter(), Effort(), Clock(0))
    assert plan.ranked
    assert {one.layout.schedule for one in plan.ranked}.isdisjoint({"1f1b"})
    assert any(not one.fits and one.layout.schedule == "1f1b" for one in plan.others)


def test_layouts_that_differ_in_one_choice_show_what_it_costs():
    plan = search(SPACE, MadeUp(), Effort(fitting=3), Clock(0))
    best, shown = plan.ranked[0].layout, [one.layout for one in [*plan.ranked, *plan.others]]
    assert set(neighbours(SPACE, best)) <= set(shown)


def test_what_other_choices_cost_has_time_after_the_predictions():
    clock, takes = Clock(0), iter([4.0, 6.5])

    class Slow(MadeUp):
        def exact(self, layout):
            clock.time += next(takes)
            return super().exact(layout)

    plan = search(SPACE, Slow(), Effort(total_seconds=10), clock)
    assert len(plan.ranked) == 2
    assert set(neighbours(SPACE, plan.ranked[0].layout)) <= {one.layout for one in [*plan.ranked, *plan.others]}


def test_what_needs_as_much_memory_as_one_that_does_not_fit_is_not_asked_for():
    costs = MadeUp()
    costs.limit = 150
    search(replace(SPACE, fixed={"parallel.pipeline": 1}), costs, Effort(), Clock(0))
    too_large = [layout for layout in costs.needs if costs.bytes(layout) > costs.limit and layout not in costs.exacts]
    full = [layout for layout in too_large if layout.recompute == "full"]
    assert full
    for layout in full:
        later = too_large[too_large.index(layout) + 1 :]
        alike = [one for one in later if one == replace(layout, recompute=one.recompute, zero=one.zero)]
        assert all(one.zero > layout.zero for one in alike)


def test_nothing_is_ranked_if_nothing_fits():
    costs = MadeUp()
    costs.limit = 0
    plan = search(SPACE, costs, Effort(), Clock(0))
    assert plan.ranked == []
    assert plan.others
    assert not costs.exacts


def test_a_search_that_runs_out_of_time_still_ranks_what_it_found():
    costs = MadeUp()
    plan = search(SPACE, costs, Effort(estimate_seconds=10, total_seconds=20), Clock(0.05))
    assert plan.ranked
    assert not plan.complete
    assert plan.estimated < best_by_hand(costs)[1]


def test_layouts_that_the_recipe_refuses_are_left_out():
    class Refusing(MadeUp):
        def need(self, layout):
            return None if layout.zero < 3 else super().need(layout)

    plan = search(SPACE, Refusing(), Effort(), Clock(0))
    assert {one.layout.zero for one in [*plan.ranked, *plan.others]} == {3}


def test_variations_of_the_best_are_predicted_too():
    class Varied(MadeUp):
        def variations(self, layout):
            return [replace(layout, balance=(1, 7))] if layout.balance == "uniform" else []

        def parts(self, layout):
            return super().parts(layout) | {"bubble": 0.0 if layout.balance == (1, 7) else 1.0}

    plan = search(SPACE, Varied(), Effort(), Clock(0))
    assert plan.ranked[0].layout.balance == (1, 7)
    unequal = search(replace(SPACE, unequal=True), Varied(), Effort(), Clock(0))
    assert unequal.ranked[0].layout.balance == (1, 7)


class OnlyUnequal(MadeUp):
    """Only layouts with unequal stages fit, those with the least layouts' memory."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def bytes(self, layout):
        return super().bytes(layout) + (10_000 if layout.balance == "uniform" else 0)

    def fitted(self, layout):
        self.asked.append(layout)
        found = replace(layout, balance=(5, 3))
        return found if layout.degrees.pipeline == 2 and self.bytes(found) <= self.limit else None


def test_unequal_stages_are_tried_before_it_is_said_that_nothing_fits():
    found, need = leanest_need(SPACE, OnlyUnequal())
    assert found.balance == (5, 3)
    assert need.excess_bytes <= 0
    nowhere = OnlyUnequal()
    nowhere.limit = 0
    found, need = leanest_need(SPACE, nowhere)
    assert (found.balance, need.excess_bytes > 0) == ("uniform", True)
    assert len(nowhere.asked) > 1


def test_unequal_stages_are_not_tried_where_all_memory_together_is_too_small():
    class Full(OnlyUnequal):
        def need(self, layout):
            return replace(super().need(layout), filled=1.5)

    costs = Full()
    assert leanest_need(SPACE, costs)[1].excess_bytes > 0
    assert costs.asked == []


@pytest.mark.parametrize("unequal", [True, False])
def test_layouts_with_unequal_stages_are_ranked_where_only_these_fit(unequal):
    """On a mixed cluster the search finds the best of them itself; else it has the one that is known."""
    costs, space = OnlyUnequal(), replace(SPACE, unequal=unequal)
    known, _ = leanest_need(space, costs)
    plan = search(space, costs, Effort(), Clock(0), [known])
    assert {one.layout.balance for one in plan.ranked} == {(5, 3)}
    best = plan.ranked[0].exact.step_seconds
    assert best < StepParts(costs.parts(known)).total if unequal else best == StepParts(costs.parts(known)).total


def test_parts_say_why_a_step_is_slower():
    best, slower = StepParts({"kernels": 5.0, "bubble": 1.0}), StepParts({"kernels": 4.0, "bubble": 2.5, "update": 0.75})
    assert slower_by(slower, best) == [("bubble", 1.5), ("update", 0.75)]
    assert slower_by(best, best) == []
