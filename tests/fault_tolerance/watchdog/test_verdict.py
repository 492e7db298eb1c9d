"""Who is named: on small worlds that stand still for a known reason, the culprit and never a healthy rank."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagualu.comm.monitor import Line
from bagualu.fault_tolerance.watchdog.verdict import SPARE, Patience, Seen, judge, missed_by

PATIENCE = Patience(hang_seconds=300, long_seconds=1800)
WORLD = Line("world", (0, 1, 2, 3))


@dataclass(frozen=True)
class Halt:
    """The fault: `rank` does not go on from operation number `at` of its own program."""

    rank: int
    at: int
    joined: bool
    """It has joined the operation but never comes back from it."""


def stand_still(ranks: int, program: list[Line], halt: Halt | None) -> dict[int, Seen]:
    """What is seen when every rank has gone as far as it can; each takes part in the lines that it is a member of."""
    own = {rank: [line for line in program if rank in line.ranks] for rank in range(ranks)}
    joined = dict.fromkeys(range(ranks), 0)  # operations of its own that a rank has joined
    done = dict.fromkeys(range(ranks), 0)  # and come back from

    def count(rank: int, line: Line) -> int:
        return own[rank][: joined[rank]].count(line)

    def may_join(rank: int) -> bool:
        halted = halt is not None and halt.rank == rank and not halt.joined and joined[rank] == halt.at
        return joined[rank] == done[rank] < len(own[rank]) and not halted

    def may_return(rank: int) -> bool:
        if joined[rank] == done[rank] or (halt is not None and halt.rank == rank and halt.joined and joined[rank] == halt.at + 1):
            return False
        line = own[rank][done[rank]]
        return all(count(other, line) >= count(rank, line) for other in line.ranks)

    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            if may_join(rank):
                joined[rank], moved = joined[rank] + 1, True
            if may_return(rank):
                done[rank], moved = done[rank] + 1, True

    seen = {}
    for rank in range(ranks):
        counts = {line: count(rank, line) for line in own[rank]}
        one = Seen(rank, step=9, steps_begun=9, point="forward", counts=counts, silent_seconds=301)
        if joined[rank] > done[rank]:
            line = own[rank][done[rank]]
            one = replace(one, operation="all_reduce", line=line, number=counts[line])
        elif done[rank] == len(own[rank]):
            one = replace(one, silent_seconds=1)  # goes on with something that needs nobody
        seen[rank] = one
    return seen


@st.composite
def worlds(draw: st.DrawFn) -> tuple[int, list[Line], Halt]:
    ranks = draw(st.integers(2, 6))
    members = st.lists(st.integers(0, ranks - 1), min_size=2, max_size=ranks, unique=True).map(lambda found: tuple(sorted(found)))
    groups = st.builds(lambda ranks: Line(f"group {ranks}", ranks), members)
    pairs = st.lists(st.integers(0, ranks - 1), min_size=2, max_size=2, unique=True).map(tuple)
    messages = st.builds(lambda pair: Line("pipeline", pair, messages=True), pairs)
    program = draw(st.lists(st.one_of(groups, messages), min_size=1, max_size=12)) + 2 * [Line("world", tuple(range(ranks)))]
    rank = draw(st.integers(0, ranks - 1))
    own = [line for line in program if rank in line.ranks]
    return ranks, program, Halt(rank, draw(st.integers(0, len(own) - 2)), draw(st.booleans()))


@given(worlds(), st.sampled_from(["running", "stopped"]))
@settings(max_examples=150)
def test_the_culprit_is_named_and_nobody_else(world: tuple[int, list[Line], Halt], process: str) -> None:
    ranks, program, halt = world
    seen = stand_still(ranks, program, halt)
    seen[halt.rank] = replace(seen[halt.rank], process=process)
    verdict = judge(seen, PATIENCE)
    assert verdict is not None
    assert verdict.culprits == (halt.rank,)
    assert f"rank {halt.rank} " in verdict.why


@given(worlds(), st.floats(0, 299))
@settings(max_examples=80)
def test_nobody_is_named_while_the_one_that_others_wait_for_may_still_come(
    world: tuple[int, list[Line], Halt], silent: float
) -> None:
    ranks, program, halt = world
    seen = stand_still(ranks, program, replace(halt, joined=False))
    seen[halt.rank] = replace(seen[halt.rank], silent_seconds=silent)
    assert judge(seen, PATIENCE) is None


@given(worlds())
def test_nobody_is_named_in_a_run_that_goes_on(world: tuple[int, list[Line], Halt]) -> None:
    assert judge(stand_still(*world[:2], None), PATIENCE) is None


@pytest.mark.parametrize("point", ["start", "validate", "load", "verify", "write", "commit", "prune"])
def test_a_point_that_takes_long_has_patience_of_its_own_but_a_stopped_process_none(point: str) -> None:
    seen = stand_still(4, [WORLD], Halt(2, 0, joined=False))
    seen[2] = replace(seen[2], point=point, silent_seconds=1700)
    assert judge(seen, PATIENCE) is None
    late, stopped = replace(seen[2], silent_seconds=1801), replace(seen[2], process="stopped", silent_seconds=301)
    for culprit in (late, stopped):
        verdict = judge({**seen, 2: culprit}, PATIENCE)
        assert verdict is not None
        assert verdict.culprits == (2,)


def test_the_first_step_of_a_process_may_take_long() -> None:
    seen = stand_still(4, [WORLD], Halt(2, 0, joined=False))
    assert judge({**seen, 2: replace(seen[2], steps_begun=1)}, PATIENCE) is None
    assert judge({**seen, 2: replace(seen[2], steps_begun=2)}, PATIENCE) is not None


@pytest.mark.parametrize("point", ["backward", "start", "validate", "load", "commit"])
def test_before_those_that_wait_give_up_the_one_they_wait_for_is_named_wherever_it_is(point: str) -> None:
    """Also in its first step (backward)."""
    patience = replace(PATIENCE, wait_seconds=450)
    seen = stand_still(4, [WORLD], Halt(2, 0, joined=False))
    seen[2] = replace(seen[2], point=point, steps_begun=1, silent_seconds=1700)
    waiting = {rank: replace(one, silent_seconds=451) for rank, one in seen.items() if one.waits}
    by_their_clocks = {rank: replace(one, silent_seconds=300, waited_seconds=451) for rank, one in seen.items() if one.waits}
    assert judge(seen, patience) is None
    for late in (waiting, by_their_clocks):
        verdict = judge({**seen, **late}, patience)
        assert verdict is not None
        assert verdict.culprits == (2,)
    assert judge({**seen, **waiting, 2: replace(seen[2], silent_seconds=299)}, patience) is None  # it does come on


def test_when_all_have_joined_and_nobody_comes_back_it_is_the_link_or_whoever_is_stopped() -> None:
    one = Seen(0, steps_begun=3, operation="all_reduce", line=WORLD, number=5, counts={WORLD: 5}, silent_seconds=301)
    seen = {rank: replace(one, rank=rank) for rank in range(4)}
    verdict = judge(seen, PATIENCE)
    assert verdict is not None
    assert verdict.culprits == ()
    assert "link" in verdict.why
    assert "all_reduce number 5 in world" in verdict.why
    verdict = judge({**seen, 3: replace(seen[3], process="stopped")}, PATIENCE)
    assert verdict is not None
    assert verdict.culprits == (3,)


def test_ranks_that_wait_for_each_other_are_named_together_and_nobody_as_the_culprit() -> None:
    one, other = Line("data", (0, 1)), Line("tensor", (0, 1))
    waits = {"operation": "all_reduce", "number": 1, "steps_begun": 3, "silent_seconds": 301}
    seen = {
        0: Seen(0, line=one, counts={one: 1, other: 0}, **waits),  # type: ignore[arg-type]
        1: Seen(1, line=other, counts={one: 0, other: 1}, **waits),  # type: ignore[arg-type]
    }
    verdict = judge(seen, PATIENCE)
    assert verdict is not None
    assert verdict.culprits == ()
    assert verdict.why.startswith("ranks 0, 1: they wait for each other")


def test_a_rank_on_another_node_is_left_to_its_own_watchdog_for_a_while() -> None:
    seen = {rank: one for rank, one in stand_still(4, [WORLD], Halt(3, 0, joined=False)).items() if rank < 2}
    assert judge(seen, PATIENCE) is None
    verdict = judge({rank: replace(one, silent_seconds=601) for rank, one in seen.items()}, PATIENCE)
    assert verdict is not None
    assert verdict.culprits == ()
    assert "another node" in verdict.why


def test_on_an_accelerator_whose_host_waits_for_nobody_the_one_that_is_behind_is_named() -> None:
    seen = {
        rank: Seen(rank, steps_begun=5, point="agree", counts={WORLD: 7 - (rank == 1)}, silent_seconds=301) for rank in range(4)
    }
    verdict = judge(seen, PATIENCE)
    assert verdict is not None
    assert verdict.culprits == (1,)
    level = judge({rank: replace(one, counts={WORLD: 7}) for rank, one in seen.items()}, PATIENCE)
    assert level is not None
    assert level.culprits == ()


def test_a_rank_that_has_nothing_to_do_is_not_looked_at() -> None:
    seen = {rank: Seen(rank, steps_begun=3, point="forward", silent_seconds=1) for rank in range(3)}
    seen[3] = Seen(3, point=SPARE, silent_seconds=10_000)
    assert judge(seen, PATIENCE) is None


def test_one_that_comes_back_late_from_what_all_have_joined_is_left_alone_while_others_come_on() -> None:
    seen = {rank: Seen(rank, steps_begun=3, point="forward", counts={WORLD: 5}, silent_seconds=1) for rank in range(1, 4)}
    seen[0] = Seen(0, steps_begun=3, operation="all_reduce", line=WORLD, number=5, counts={WORLD: 5}, silent_seconds=301)
    assert judge(seen, PATIENCE) is None


@given(worlds(), st.floats(0, 400))
@settings(max_examples=80)
def test_who_gives_up_names_whom_it_waited_for_or_nobody(world: tuple[int, list[Line], Halt], silent: float) -> None:
    """`silent` below 150: the one that was missing may only just have got there, and not be the one who kept the others."""
    ranks, program, halt = world
    patience = Patience(150, 150)
    seen = stand_still(ranks, program, replace(halt, joined=False))
    seen[halt.rank] = replace(seen[halt.rank], silent_seconds=silent)
    waiting = [rank for rank, one in seen.items() if one.waits]
    found = {rank: missed_by(rank, seen, patience) for rank in seen}
    for verdict in found.values():
        assert verdict is None or (silent >= 150 and verdict.culprits == (halt.rank,))
    if silent >= 150:
        assert [rank for rank, verdict in found.items() if verdict] == waiting
    healthy = stand_still(ranks, program, None)
    assert not any(missed_by(rank, healthy, patience) for rank in healthy)


def test_who_was_not_waiting_for_long_names_nobody() -> None:
    """A connection that was closed: who has not come yet is not who is gone."""
    seen = stand_still(4, [WORLD], Halt(2, 0, joined=False))
    seen[0] = replace(seen[0], silent_seconds=1)
    assert missed_by(0, seen, Patience(150, 150)) is None
    assert missed_by(1, seen, Patience(150, 150)) is not None
