"""What counts as a spike: robust against noise, and never a matter of the last digits."""

import random

import pytest

from bagualu.fault_tolerance.guard.spike import History


def seen(values: list[float], window: int = 16) -> History:
    history = History(window)
    for value in values:
        history.add(value)
    return history


def noisy(count: int, scatter: float, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [2.0 * draw.lognormvariate(0.0, scatter) for _ in range(count)]


def test_a_multiple_of_the_usual_stands_out_and_less_does_not() -> None:
    history = seen(noisy(16, 0.01))
    assert history.stands_out(25.0, 10.0)
    assert not history.stands_out(15.0, 10.0)
    assert not history.stands_out(0.01, 10.0), "a figure that falls is no spike"


def test_scatter_raises_the_bar() -> None:
    assert seen(noisy(64, 0.01), 64).stands_out(30.0, 10.0)
    assert not seen(noisy(64, 0.8), 64).stands_out(30.0, 10.0)


def test_one_spike_that_was_committed_does_not_hide_the_next() -> None:
    assert seen([*noisy(15, 0.01), 500.0]).stands_out(500.0, 10.0)


def test_nothing_is_judged_before_a_quarter_of_the_window_is_seen() -> None:
    assert not seen([1.0] * 15, 64).stands_out(1e9, 10.0)
    assert seen([1.0] * 16, 64).stands_out(1e9, 10.0)


def test_no_false_alarm_in_ten_thousand_steps_of_a_noisy_run() -> None:
    history = History(64)
    for value in noisy(10_000, 0.5, seed=3):
        assert not history.stands_out(value, 10.0)
        history.add(value)


def test_equal_figures_are_no_matter_of_the_last_digit() -> None:
    """With no scatter at all the factor is still a margin."""
    history = seen([1.0] * 16)
    for value in (1.0, 1.0 + 1e-12, 1.0 - 1e-12, 1.5):
        assert not history.stands_out(value, 2.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_what_has_no_logarithm_is_no_spike(value: float) -> None:
    assert not seen([1.0] * 16).stands_out(value, 2.0)


def test_factor_zero_looks_for_none() -> None:
    assert not seen([1.0] * 16).stands_out(1e300, 0.0)


def test_only_the_window_counts() -> None:
    history = seen([1000.0] * 50 + [1.0] * 16)
    assert history.values == [1.0] * 16
    history.load([1.0] * 20)
    assert len(history.values) == 16
