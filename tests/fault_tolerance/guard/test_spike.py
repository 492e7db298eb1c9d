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


def mixed(history: History, values: list[float], factor: float = 2.0) -> list[int]:
    """Steps (from 1) that stand out, as the guard counts: those that stand out are hard too, and not committed."""
    found, row = [], 0
    for step, value in enumerate(values, 1):
        flagged = history.stands_out(value, factor, step, row)
        hard = history.is_hard(value, factor)
        if hard:
            history.add_hard(step, value)
        row = row + 1 if hard else 0
        if flagged:
            found.append(step)
        else:
            history.add(value)
    return found


def easy_and_hard(count: int, share: float, seed: int) -> list[float]:
    """Losses around 0.02, some around 1.25."""
    draw = random.Random(seed)
    return [(1.25 if draw.random() < share else 0.02) * draw.lognormvariate(0, 0.05) for _ in range(count)]


@pytest.mark.parametrize("share", [0.05, 0.07, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_hard_text_that_comes_again_and_again_soon_does_not_stand_out(share: float, seed: int) -> None:
    found = mixed(History(64), easy_and_hard(1200, share, seed))
    assert len(found) <= 4


def test_a_value_is_usual_where_three_as_large_were_before() -> None:
    assert seen([0.02] * 62 + [1.25] * 2, 64).stands_out(1.3, 2.0)
    assert seen([0.02] * 13 + [1.25] * 3 + [0.02] * 48, 64).stands_out(1.3, 2.0), "too long ago"
    assert not seen([0.02] * 61 + [1.25] * 3, 64).stands_out(1.3, 2.0)
    assert seen([0.02] * 61 + [1.25] * 3, 64).stands_out(2.6, 2.0), "beyond the hard text too"


@pytest.mark.parametrize("share", [0.07, 0.2])
def test_corruption_stands_out_from_hard_text(share: float) -> None:
    values = easy_and_hard(1200, share, 1)
    garbled = set(range(150, 1200, 50))
    for step in garbled:
        values[step - 1] = 8.0
    assert garbled <= set(mixed(History(64), values))


def test_another_kind_of_text_is_taken_after_two_steps_in_a_row() -> None:
    assert mixed(History(64), [0.02] * 100 + [8.0, 7.0, *[6.0 * 0.98**n for n in range(100)]]) == [101, 102]


def test_two_strangers_far_apart_make_no_third_one_known() -> None:
    values = [0.02] * 900
    strangers = [200, 300, 400, 500, 600, 700, 800]
    for step in strangers:
        values[step - 1] = 8.0
    assert mixed(History(64), values) == strangers


def test_hard_values_are_forgotten_after_four_windows() -> None:
    history = History(16)
    for step in (10, 20, 30, 40, 90):
        history.add_hard(step, 5.0)
    assert [step for step, _ in history.hard] == [30, 40, 90]


def test_corruption_stands_out_where_the_scatter_between_easy_and_hard_would_hide_it() -> None:
    values = easy_and_hard(64, 0.5, 2)
    assert seen(values, 64).stands_out(8.0, 2.0)


def test_a_falling_loss_does_not_hide_corruption() -> None:
    values = [5.5 * 0.96**step for step in range(100)]
    assert seen(values, 64).stands_out(5.5, 2.0)
