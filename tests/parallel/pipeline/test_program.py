"""What a rank knows to have arrived has arrived, and it knows of nearly everything: few sends are kept."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagualu.comm.errors import RecipeError
from bagualu.parallel.pipeline.check import received_as
from bagualu.parallel.pipeline.program import program
from bagualu.parallel.pipeline.registry import SCHEDULES, compute_schedule
from bagualu.parallel.pipeline.schedules.schedule import RECEIVES, SENDS, Action, Schedule, with_messages


def random_execution(schedule: Schedule, seed: int) -> dict[Action, int]:
    """When every message action was done in one of the orders that are possible: ranks go on in turns drawn at random."""
    draw, place, sent, when = random.Random(seed), [0] * len(schedule.actions), set(), {}
    while able := [
        rank
        for rank, actions in enumerate(schedule.actions)
        if place[rank] < len(actions) and (actions[place[rank]].kind not in RECEIVES or actions[place[rank]] in sent)
    ]:
        rank = draw.choice(able)
        action = schedule.actions[rank][place[rank]]
        place[rank] += 1
        when[action] = len(when)
        if action.kind in SENDS:
            sent.add(received_as(action))
    return when


@given(st.sampled_from(SCHEDULES), st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**32))
def test_in_whatever_order_ranks_go_on(name: str, ranks: int, micro_batches: int, seed: int) -> None:
    try:
        schedule = with_messages(compute_schedule(name, ranks, micro_batches))
    except RecipeError:  # not for this many micro-batches
        return
    when = random_execution(schedule, seed)
    for rank in range(ranks):
        known = program(schedule, rank).arrived
        released = [send for sends in known.values() for send in sends]
        assert len(released) == len(set(released))
        for receive, sends in known.items():
            assert all(when[received_as(send)] < when[receive] for send in sends)


@pytest.mark.parametrize("name", SCHEDULES)
def test_few_sends_are_kept(name: str) -> None:
    """As many as ranks times chunks, not as many as micro-batches; gpipe has nothing to hear in its first half."""
    ranks, micro_batches = 4, 32
    schedule = with_messages(compute_schedule(name, ranks, micro_batches))
    bound = micro_batches if name == "gpipe" else 3 * schedule.placement.stages
    for rank in range(ranks):
        mine, kept, most = program(schedule, rank), 0, 0
        for action in mine.actions:
            kept += (action.kind in SENDS) - len(mine.arrived.get(action, ()))
            most = max(most, kept)
        assert most <= bound
