"""The checker accepts every schedule there is, its costs are those of the formulas, and broken schedules are refused with the place
at fault."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.check import ScheduleError, check
from bagualu.parallel.pipeline.registry import FAMILIES, SCHEDULES, compute_schedule
from bagualu.parallel.pipeline.schedules.formula import Size
from bagualu.parallel.pipeline.schedules.schedule import PASSES, Action, Kind, Schedule, forward_only, with_messages
from bagualu.parallel.pipeline.timeline import per_kind, simulate

EVEN = (1, 1, 1)
COSTS = [EVEN, (2, 2, 1), (1, 2, 1), (2, 3, 1), (1, 2, 2), (10, 11, 9), (1, 1, 2)]


def grid(name: str) -> list[tuple[int, int, int]]:
    """Ranks, chunks and micro-batches: one, fewer than ranks, as many, odd numbers, many."""
    chunks = FAMILIES[name].chunks or (2, 3, 4)
    return [(p, v, m) for v in chunks for p in (1, 2, 3, 4, 8) for m in {1, 2, 3, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 3, 4 * p}]


def peaks_of(name: str, p: int, v: int, m: int) -> list[int]:
    return check(with_messages(compute_schedule(name, p, m, v)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_size_is_right_and_holds_what_the_formula_says(name: str) -> None:
    formula = FAMILIES[name].formula
    for p, v, m in grid(name):
        peak, published = max(peaks_of(name, p, v, m)), formula.peak(Size(p, v, m))
        assert peak == published if m >= formula.least(p) else peak <= published, (p, v, m)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bubble_is_that_of_the_formula(name: str) -> None:
    formula, compared = FAMILIES[name].formula, 0
    for p, v, m in grid(name):
        schedule = compute_schedule(name, p, m, v)
        for cost in COSTS:
            published = formula.share(Size(p, v, m, *cost))
            if published is not None:
                bubble = simulate(schedule, per_kind(*cost)).own_bubble
                assert bubble <= published if formula.bound else bubble == published, (p, v, m, cost)
                compared += 1
    assert compared >= 20


def by_hand(name: str, p: int, v: int, m: int) -> tuple[Fraction | float, list[int]]:
    timeline = simulate(compute_schedule(name, p, m, v), per_kind(*EVEN))
    return timeline.own_bubble, peaks_of(name, p, v, m)


@pytest.mark.parametrize(
    ("name", "p", "v", "m", "bubble", "peaks"),
    [
        ("gpipe", 4, 1, 8, Fraction(3, 11), [8, 8, 8, 8]),
        ("1f1b", 4, 1, 8, Fraction(3, 11), [4, 3, 2, 1]),
        ("interleaved_1f1b", 4, 2, 8, Fraction(3, 19), [11, 9, 7, 5]),  # of half stages: rank 0 holds 4 + 3/2 of whole ones
        ("interleaved_1f1b", 4, 3, 8, Fraction(3, 27), [15, 13, 11, 9]),
        ("zb_h1", 4, 1, 8, Fraction(3, 27), [4, 4, 4, 4]),
        ("zb_v", 4, 2, 8, Fraction(0), [8, 8, 8, 8]),
        ("v_half", 4, 2, 8, Fraction(9, 57), [6, 6, 6, 6]),
        ("dualpipe_v", 4, 2, 8, Fraction(3, 51), [9, 9, 9, 9]),
    ],
)
def test_bubbles_and_peaks_written_out(name: str, p: int, v: int, m: int, bubble: Fraction, peaks: list[int]) -> None:
    assert by_hand(name, p, v, m) == (bubble, peaks)


def test_the_bubble_of_a_step_counts_what_ranks_wait_for_the_last_one() -> None:
    timeline = simulate(compute_schedule("zb_v", 4, 8), per_kind(*EVEN))
    assert (timeline.longest, timeline.end) == (48, 51)
    assert (timeline.own_bubble, timeline.bubble) == (0, Fraction(3, 51))


def test_dualpipe_v_waits_less_than_published_because_pairs_hand_on_early() -> None:
    for p in (2, 3, 4, 8):
        size = Size(p, 2, 2 * p)
        own_bubble = simulate(compute_schedule("dualpipe_v", p, 2 * p), per_kind(*EVEN)).own_bubble
        assert own_bubble == Fraction(p - 1, p - 1 + size.work)


def test_v_half_keeps_up_when_costs_are_uneven() -> None:
    """As long as 2F <= W+2I and 2I <= W+2F more micro-batches do not make it wait longer: only the start and the end cost."""
    for cost in ((10, 11, 9), (2, 2, 1), (1, 2, 2), (2, 3, 2), (3, 2, 2)):
        waits = [
            timeline.longest - timeline.busy(0)
            for timeline in (simulate(compute_schedule("v_half", 4, m), per_kind(*cost)) for m in (8, 16, 32))
        ]
        assert len(set(waits)) == 1, (cost, waits)


def test_the_peak_counts_all_stages_of_a_rank() -> None:
    assert peaks_of("interleaved_1f1b", 2, 2, 4) == [5, 3]


def good() -> Schedule:
    return with_messages(compute_schedule("1f1b", 3, 4))


def split() -> Schedule:
    return with_messages(compute_schedule("zb_v", 2, 3))


def action(spelled: str) -> Action:
    """F1 on 2: the forward pass of micro-batch 1 at stage 2."""
    what, stage = spelled.split(" on ")
    kind = what.rstrip("0123456789")
    return Action(Kind(kind), int(what[len(kind) :]), int(stage))


def without(schedule: Schedule, rank: int, spelled: str) -> Schedule:
    schedule.actions[rank].remove(action(spelled))
    return schedule


def swapped(schedule: Schedule, rank: int, one: str, other: str) -> Schedule:
    actions = schedule.actions[rank]
    i, j = actions.index(action(one)), actions.index(action(other))
    actions[i], actions[j] = actions[j], actions[i]
    return schedule


def with_extra(schedule: Schedule, rank: int, spelled: str) -> Schedule:
    schedule.actions[rank].append(action(spelled))
    return schedule


BROKEN = {
    "missing forward": (without(good(), 1, "F2 on 1"), "rank 1 does F2 of stage 1 0 times instead of 1"),
    "missing backward": (without(good(), 0, "B3 on 0"), "rank 0 does B3 of stage 0 0 times instead of 1"),
    "missing send": (without(good(), 0, "SA1 on 0"), "rank 0 does SA1 of stage 0 0 times instead of 1"),
    "missing receive": (without(good(), 2, "RA1 on 2"), "rank 2 does RA1 of stage 2 0 times instead of 1"),
    "a pass twice": (with_extra(good(), 2, "B0 on 2"), "rank 2 does B0 of stage 2 2 times instead of 1"),
    "a micro-batch too many": (with_extra(good(), 0, "F4 on 0"), "rank 0 does F4 of stage 0 1 times instead of 0"),
    "a stage of another rank": (with_extra(good(), 0, "F0 on 1"), "rank 0 does F0 of stage 1 1 times instead of 0"),
    "a message to nobody": (with_extra(good(), 2, "SA0 on 2"), "rank 2 does SA0 of stage 2 1 times instead of 0"),
    "backward first": (swapped(good(), 2, "F1 on 2", "B1 on 2"), "rank 2 does B1 of stage 2 before F1 of stage 2"),
    "sent before it is there": (swapped(good(), 0, "F1 on 0", "SA1 on 0"), "rank 0 does SA1 of stage 0 before F1 of stage 0"),
    "used before it came": (swapped(good(), 1, "RA2 on 1", "F2 on 1"), "rank 1 does F2 of stage 1 before RA2 of stage 1"),
    "messages that overtake": (swapped(good(), 0, "SA0 on 0", "SA1 on 0"), "rank 0 does SA1 of stage 0 before F1 of stage 0"),
    "missing weight gradient": (without(split(), 1, "W1 on 2"), "rank 1 does W1 of stage 2 0 times instead of 1"),
    "weight gradient first": (swapped(split(), 0, "I1 on 0", "W1 on 0"), "rank 0 does W1 of stage 0 before I1 of stage 0"),
    "backward both whole and split": (with_extra(split(), 1, "B1 on 2"), "rank 1 does B1 of stage 2 1 times instead of 0"),
    "a message within a rank": (with_extra(split(), 1, "SA0 on 1"), "rank 1 does SA0 of stage 1 1 times instead of 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_schedule_is_refused(name: str) -> None:
    schedule, message = BROKEN[name]
    with pytest.raises(ScheduleError, match=f"^{message}$"):
        check(schedule)


def test_an_order_that_differs_between_neighbours_is_refused() -> None:
    schedule = compute_schedule("gpipe", 2, 2)
    first = schedule.actions[0]
    first[0], first[1] = first[1], first[0]
    with pytest.raises(ScheduleError, match="rank 1 wants RA0 of stage 1 but the next message is RA1 of stage 1"):
        check(with_messages(schedule))


def test_an_order_that_differs_between_chunks_is_refused() -> None:
    """Both chunks of rank 1 receive from rank 0."""
    schedule = compute_schedule("interleaved_1f1b", 2, 2)
    second = schedule.actions[1]
    i, j = second.index(action("F1 on 1")), second.index(action("F0 on 3"))
    second[i], second[j] = second[j], second[i]
    with pytest.raises(ScheduleError, match="rank 1 wants RA0 of stage 3 but the next message is RA1 of stage 1"):
        check(with_messages(schedule))


def test_a_deadlock_names_every_rank_that_waits_and_for_what() -> None:
    schedule = compute_schedule("gpipe", 2, 2)
    schedule.actions[0] = [action(f"{one} on 0") for one in ("F0", "B0", "F1", "B1")]
    with pytest.raises(ScheduleError, match=r"^deadlock: rank 0 at RG0 of stage 0, rank 1 at RA1 of stage 1$"):
        check(with_messages(schedule))


@pytest.mark.parametrize(("one", "other"), [("F0 on 1", "F0 on 2"), ("I0 on 2", "I0 on 1")])
def test_a_chunk_that_needs_what_its_own_rank_does_later_is_found(one: str, other: str) -> None:
    schedule = compute_schedule("zb_v", 2, 1)
    mine = schedule.actions[1]
    mine.remove(action(other))
    mine.insert(mine.index(action(one)), action(other))
    with pytest.raises(
        ScheduleError, match=f"rank 1 does {other.replace('on', 'of stage')} before {one.replace('on', 'of stage')}"
    ):
        check(with_messages(schedule))


def test_a_schedule_for_another_number_of_micro_batches_is_refused() -> None:
    actions = good().actions
    with pytest.raises(ScheduleError, match="F4 of stage 0 0 times instead of 1"):
        check(Schedule(StagePlacement(3), 5, actions))
    with pytest.raises(ScheduleError, match="1 times instead of 0"):
        check(Schedule(StagePlacement(3), 3, actions))


@given(st.sampled_from(SCHEDULES), st.integers(1, 4), st.integers(1, 5), st.data())
def test_any_single_change_is_found_or_harmless(name: str, ranks: int, micro_batches: int, data: st.DataObject) -> None:
    """Move one action elsewhere in its list: what the checker lets pass has times, so nobody waits for ever."""
    schedule = with_messages(compute_schedule(name, ranks, micro_batches))
    actions = schedule.actions[data.draw(st.integers(0, ranks - 1))]
    moved = actions.pop(data.draw(st.integers(0, len(actions) - 1)))
    actions.insert(data.draw(st.integers(0, len(actions))), moved)
    try:
        check(schedule)
    except ScheduleError:
        return
    timeline = simulate(schedule, per_kind(*EVEN))
    assert [len(spans) for spans in timeline.ranks] == [sum(a.kind in PASSES for a in mine) for mine in schedule.actions]


def test_validation_goes_forward_over_every_placement_without_a_deadlock() -> None:
    for placement in (StagePlacement(1), StagePlacement(3), StagePlacement(2, 3), StagePlacement(3, 2, v_shaped=True)):
        timeline = simulate(with_messages(forward_only(placement, 4)), per_kind(*EVEN))
        assert sum(map(len, timeline.ranks)) == 4 * placement.stages
