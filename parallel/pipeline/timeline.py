"""Computes the time at which each pass of a schedule runs.

Every pass begins as soon as its rank is free and its inputs are available. If the costs are integers or fractions, times are exact.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bagualu.parallel.pipeline.schedules.formula import Time, share
from bagualu.parallel.pipeline.schedules.schedule import PASSES, Action, Kind, Schedule, dependencies, parts

Cost = Callable[[Action], Time]
"""A function that returns the duration of a pass."""


@dataclass(frozen=True)
class Span:
    """A pass that runs from `start` to `end`, in the unit of the costs."""

    action: Action
    start: Time
    end: Time


@dataclass(frozen=True)
class Timeline:
    """The passes of each rank, with their times, in order."""

    ranks: list[list[Span]]

    @property
    def end(self) -> Time:
        return max(span.end for spans in self.ranks for span in spans)

    def busy(self, rank: int) -> Time:
        return sum(span.end - span.start for span in self.ranks[rank])

    @property
    def longest(self) -> Time:
        """The longest time that any rank takes from its own first to its own last pass."""
        return max(spans[-1].end - spans[0].start for spans in self.ranks)

    @property
    def bubble(self) -> Time:
        """The fraction of all ranks' time, from 0 until the last pass of any rank ends, in which ranks wait."""
        return self._waiting(self.end)

    @property
    def own_bubble(self) -> Time:
        """The bubble as formula.py defines it: the fraction of the time `longest` in which ranks do not compute, on average.

        It ignores that ranks start and end at different times. Steps follow each other with so little waiting only if nothing
        synchronises the ranks between them.
        """
        return self._waiting(self.longest)

    def _waiting(self, time: Time) -> Time:
        return 1 - share(sum(self.busy(rank) for rank in range(len(self.ranks))), time * len(self.ranks))


def per_kind(forward: Time = 1, input_gradient: Time = 1, weight_gradient: Time = 0) -> Cost:
    """Returns a cost function in which a pass costs the same at every stage. A whole backward pass costs as much as I and W
    together."""
    table = {
        Kind.FORWARD: forward,
        Kind.BACKWARD: input_gradient + weight_gradient,
        Kind.INPUT_GRADIENT: input_gradient,
        Kind.WEIGHT_GRADIENT: weight_gradient,
    }
    return lambda action: table[action.kind]


def simulate(schedule: Schedule, cost: Cost, message: Time = 0) -> Timeline:
    """Returns the times of all passes, of which `cost` gives the durations. `message` is the duration of a message between two
    ranks; only its receiver waits for it.

    Raises ValueError if passes wait for each other.
    """
    passes = [[action for action in actions if action.kind in PASSES] for actions in schedule.actions]
    spans: list[list[Span]] = [[] for _ in passes]
    ends: dict[Action, Time] = {}
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(passes):
            for action in actions[len(spans[rank]) :]:
                arrival = _arrival(schedule, action, ends, message)
                if arrival is None:
                    break
                start = max(spans[rank][-1].end if spans[rank] else 0, arrival)
                end = start + cost(action)
                spans[rank].append(Span(action, start, end))
                ends |= dict.fromkeys(parts(action), end)
                moved = True
    if any(len(done) < len(actions) for done, actions in zip(spans, passes, strict=True)):
        raise ValueError("the passes of this schedule wait for each other; check() names them")
    return Timeline(spans)


def _arrival(schedule: Schedule, action: Action, ends: dict[Action, Time], message: Time) -> Time | None:
    """Returns the time at which all results that the pass needs are available; None if one of them has no time yet."""
    rank_of = schedule.placement.rank_of
    inputs = dependencies(action, schedule.placement)
    if not all(needed in ends for needed in inputs):
        return None
    rank = rank_of(action.stage)
    return max((ends[needed] + (0 if rank_of(needed.stage) == rank else message) for needed in inputs), default=0)
