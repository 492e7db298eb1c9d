"""A communication is timed until it has been timed for long enough, whatever its first call took."""

import time

from bagualu.comm.group import Communicator
from bagualu.launch.machine.links import _seconds
from tests.harness import run

QUICK, SLOW_SECONDS, LEAST_SECONDS = 2, 0.02, 0.01


def count(communicator: Communicator, slow: tuple[int, ...]) -> tuple[int, float]:
    """The number of calls of a communication that is quick twice, and then slow on the ranks `slow`; and its usual time."""
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        if calls > QUICK and communicator.rank in slow:
            time.sleep(SLOW_SECONDS)

    usual = _seconds(call, communicator.world, LEAST_SECONDS)
    return calls, usual


def test_a_quick_first_call_does_not_call_for_many_slow_ones() -> None:
    assert [calls for calls, _ in run("simulated", 2, count, (0, 1))] == [3, 3]


def test_ranks_repeat_a_call_equally_often_though_it_takes_one_of_them_longer() -> None:
    assert [calls for calls, _ in run("simulated", 2, count, (1,))] == [3, 3]


def test_a_call_that_takes_no_time_is_repeated_a_limited_number_of_times() -> None:
    (calls, usual), (others, _) = run("simulated", 2, count, ())
    assert calls == others <= 201
    assert 0 < usual < LEAST_SECONDS
