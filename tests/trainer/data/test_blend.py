"""Blends: every sample of a source is used once an epoch, in proportion to its weight, over any number of changes of weights."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.blend import CYCLE, BlendCycle, BlendEntry, BlendHistory, Period, changed_source, read_periods


def period(first: int, **weights: float) -> Period:
    return Period(first, [f"{name}.bin" for name in weights], list(weights), list(weights.values()))


def used(history: BlendHistory, steps: range) -> list[tuple[str, int]]:
    """(source, number of its sample) in the order in which they are used."""
    samples = []
    for step in steps:
        at, owners, numbers = history.samples(step)
        samples += [(at.fingerprints[owner], int(number)) for owner, number in zip(owners, numbers, strict=True)]
    return samples


def assert_none_lost_and_none_twice(samples: list[tuple[str, int]]) -> None:
    assert max(Counter(samples).values()) == 1
    for name, count in Counter(source for source, _ in samples).items():
        assert {number for source, number in samples if source == name} == set(range(count))


weights = st.lists(st.floats(0.001, 1000), min_size=1, max_size=5)


@settings(deadline=None)
@given(weights, st.integers(0, 3 * CYCLE))
def test_a_blend_follows_its_weights_at_every_place(shares: list[float], position: int) -> None:
    cycle = BlendCycle(shares)
    assert cycle.counts.sum() == CYCLE
    assert cycle.counts.min() >= 1
    before = cycle.before(position)
    assert sum(before) == position
    owners, numbers = cycle.at(np.array([position]))
    assert numbers[0] == before[owners[0]]
    for count, share in zip(before, np.array(shares) / sum(shares), strict=True):
        assert abs(count - position * share) <= len(shares) * (2 + position / CYCLE)


changes = st.lists(
    st.tuples(st.integers(1, 9), st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 9), min_size=1)), min_size=1
)


@settings(deadline=None, max_examples=50)
@given(changes, st.integers(1, 40))
def test_weights_that_change_lose_and_repeat_nothing(parts: list[tuple[int, dict[str, float]]], global_batch: int) -> None:
    """Each part of a run is a start of its own, which knows the weights of its recipe and what the checkpoint before holds."""
    step, samples, saved = 0, [], None
    for steps, shares in parts:
        history = BlendHistory([period(0, **shares)], global_batch)
        if saved is not None:
            periods = read_periods(saved)
            assert periods is not None
            history = history.resumed(periods, step)
        samples += used(history, range(step, step + steps))
        step, saved = step + steps, history.as_json()
    assert_none_lost_and_none_twice(samples)
    assert used(history, range(step)) == samples  # an earlier step can be computed again


def test_a_run_that_goes_on_with_the_same_weights_is_the_run_that_was_never_stopped() -> None:
    straight = BlendHistory([period(0, a=0.7, b=0.3)], 6)
    again = straight.resumed(straight.periods, 5).resumed(straight.periods, 9)
    assert again.as_json() == straight.as_json()
    assert used(again, range(20)) == used(straight, range(20))


def test_a_resume_far_away_is_as_quick_as_any() -> None:
    history = BlendHistory([period(0, a=1, b=2), period(10**9, a=5, b=2, c=1), period(2 * 10**9, c=1)], 1024)
    at, owners, numbers = history.samples(2 * 10**9)
    assert (at.fingerprints, set(owners), numbers[0]) == (["c"], {0}, 10**9 * 1024 // 8)


def test_sources_are_known_by_their_tokens() -> None:
    saved = [period(0, x=1, y=1)]
    assert changed_source(saved, {"x.bin": "x", "z.bin": "new"}) is None
    assert changed_source(saved, {"moved": "x", "y.bin": "y"}) is None
    assert changed_source(saved, {"y.bin": "other"}) == "y.bin"
    assert changed_source(saved, {"x.bin": "y", "y.bin": "x"}) is None


@pytest.mark.parametrize("wrong", [None, 3, [], [{"first_step": 0}], [period(1, a=1).__dict__], [period(0, a=0).__dict__],
                                   [period(0, a=1).__dict__ | {"weights": [1, 2]}]])  # fmt: skip
def test_a_damaged_history_is_told(wrong: Any) -> None:
    assert read_periods(wrong) is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a.bin", "a.bin has no source with a weight; e.g. 'data.blend="),
        ({"source": "a.bin"}, "has no source with a weight"),
        ({"source": "a.bin", "weight": 0}, "weight=0 of a.bin must be a number above 0"),
        ({"source": "a.bin", "weight": "much"}, "weight=much of a.bin must be a number above 0"),
        ({"source": "a.bin", "weight": 1, "wieght": 2}, "has the unknown key wieght; there are format, source, validation, weight"),
        ({"source": "a.bin", "weight": 1, "format": 2}, "format=2 of a.bin must be text"),
    ],
)
def test_entries_that_describe_nothing_are_refused(entry: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        BlendEntry.read(entry)
