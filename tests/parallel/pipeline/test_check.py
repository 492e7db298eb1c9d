"""The checker accepts every schedule there is, knows its cost, and refuses broken ones with the place at fault."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagualu.parallel.pipeline.check import ScheduleError, check
from bagualu.parallel.pipeline.draw import start_times
from bagualu.parallel.pipeline.schedule import SCHEDULES, Action, Kind, Schedule, compute_schedule, with_messages

GRID = [(stages, micro_batches) for stages in (1, 2, 3, 4, 8) for micro_batches in (1, 2, 3, 4, 7, 8, 16)]


def bubble(schedule: Schedule, forward: int, backward: int) -> Fraction:
    """Share of the stages' time, until the last pass ends, in which they wait."""
    cost = {Kind.FORWARD: forward, Kind.BACKWARD: backward}
    starts = start_times(schedule, cost)
    end = max(time + cost[action.kind] for times in starts for action, time in times.items())
    busy = sum(cost[action.kind] for times in starts for action in times)
    return 1 - Fraction(busy, end * len(schedule))


@pytest.mark.parametrize("cost", [(1, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bubble_is_that_of_the_formula(name: str, cost: tuple[int, int]) -> None:
    for p, m in GRID:
        assert bubble(compute_schedule(name, p, m), *cost) == Fraction(p - 1, m + p - 1), (p, m)


def test_activations_in_flight_are_those_of_the_formula() -> None:
    for p, m in GRID:
        assert check(with_messages(compute_schedule("gpipe", p, m)), m).peak_in_flight == [m] * p
        assert check(with_messages(compute_schedule("1f1b", p, m)), m).peak_in_flight == [min(p - i, m) for i in range(p)]


def good() -> Schedule:
    return with_messages(compute_schedule("1f1b", 3, 4))


def position(schedule: Schedule, stage: int, spelled: str) -> int:
    return [str(action) for action in schedule[stage]].index(spelled)


def without(stage: int, spelled: str) -> Schedule:
    schedule = good()
    del schedule[stage][position(schedule, stage, spelled)]
    return schedule


def swapped(stage: int, one: str, other: str) -> Schedule:
    schedule = good()
    i, j = position(schedule, stage, one), position(schedule, stage, other)
    schedule[stage][i], schedule[stage][j] = schedule[stage][j], schedule[stage][i]
    return schedule


def with_extra(stage: int, action: Action) -> Schedule:
    schedule = good()
    schedule[stage].append(action)
    return schedule


BROKEN = {
    "missing forward": (without(1, "F2"), "stage 1 does F2 0 times instead of 1"),
    "missing backward": (without(0, "B3"), "stage 0 does B3 0 times instead of 1"),
    "missing send": (without(0, "SA1"), "stage 0 does SA1 0 times instead of 1"),
    "missing receive": (without(2, "RA1"), "stage 2 does RA1 0 times instead of 1"),
    "a pass twice": (with_extra(2, Action(Kind.BACKWARD, 0)), "stage 2 does B0 2 times instead of 1"),
    "a micro-batch too many": (with_extra(0, Action(Kind.FORWARD, 4)), "stage 0 does F4 1 times instead of 0"),
    "a message to nobody": (with_extra(2, Action(Kind.SEND_ACTIVATION, 0)), "stage 2 does SA0 1 times instead of 0"),
    "backward first": (swapped(2, "F1", "B1"), "stage 2 does B1 before F1"),
    "sent before it is there": (swapped(0, "F1", "SA1"), "stage 0 does SA1 before F1"),
    "used before it came": (swapped(1, "RA2", "F2"), "stage 1 does F2 before RA2"),
    "messages that overtake": (swapped(0, "SA0", "SA1"), "stage 0 does SA1 before F1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_schedule_is_refused(name: str) -> None:
    schedule, message = BROKEN[name]
    with pytest.raises(ScheduleError, match=f"^{message}$"):
        check(schedule, 4)


def test_an_order_that_differs_between_neighbours_is_refused() -> None:
    first = [Action(kind, m) for m in (1, 0) for kind in (Kind.FORWARD,)] + [Action(Kind.BACKWARD, m) for m in (0, 1)]
    last = compute_schedule("gpipe", 2, 2)[1]
    with pytest.raises(ScheduleError, match="stage 1 wants RA0 but the next message is of micro-batch 1"):
        check(with_messages([first, last]), 2)


def test_a_deadlock_names_every_stage_that_waits_and_for_what() -> None:
    impatient = [Action(Kind.FORWARD, 0), Action(Kind.BACKWARD, 0), Action(Kind.FORWARD, 1), Action(Kind.BACKWARD, 1)]
    patient = compute_schedule("gpipe", 2, 2)[1]
    with pytest.raises(ScheduleError, match=r"^deadlock: stage 0 at RG0, stage 1 at RA1$"):
        check(with_messages([impatient, patient]), 2)


def test_a_schedule_for_another_number_of_micro_batches_is_refused() -> None:
    with pytest.raises(ScheduleError, match="F4 0 times instead of 1"):
        check(good(), 5)
    with pytest.raises(ScheduleError, match="1 times instead of 0"):
        check(good(), 3)


@given(st.sampled_from(SCHEDULES), st.integers(1, 5), st.integers(1, 6), st.data())
def test_any_single_change_is_found_or_harmless(name: str, stages: int, micro_batches: int, data: st.DataObject) -> None:
    """Move one action elsewhere in its list: what the checker lets pass has times, so nobody waits for ever."""
    schedule = with_messages(compute_schedule(name, stages, micro_batches))
    actions = schedule[data.draw(st.integers(0, stages - 1))]
    moved = actions.pop(data.draw(st.integers(0, len(actions) - 1)))
    actions.insert(data.draw(st.integers(0, len(actions))), moved)
    try:
        check(schedule, micro_batches)
    except ScheduleError:
        return
    assert all(len(times) == 2 * micro_batches for times in start_times(schedule))
