"""Micro-batches over unequal replicas, against every way to give them out."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagualu.comm.errors import RecipeError
from bagualu.parallel.balance.replicas import shares


@given(st.lists(st.floats(0.1, 4.0), min_size=1, max_size=4), st.integers(0, 8))
def test_no_other_way_ends_earlier(speeds: list[float], more: int) -> None:
    total = len(speeds) + more
    counts = shares(total, speeds)
    assert sum(counts) == total
    assert min(counts) >= 1
    ways = (way for way in product(range(1, more + 2), repeat=len(speeds)) if sum(way) == total)
    least = min(max(n / speed for n, speed in zip(way, speeds, strict=True)) for way in ways)
    assert max(n / speed for n, speed in zip(counts, speeds, strict=True)) <= least * (1 + 1e-12)


def test_equal_speeds_share_evenly_and_half_the_speed_takes_half() -> None:
    assert shares(10, [1.0, 1.0, 1.0]) == [4, 3, 3]
    assert shares(12, [1.0, 0.5]) == [8, 4]


def test_fewer_micro_batches_than_replicas_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"2 micro-batches are fewer than 3 replicas; .* parallel.data=2 or less"):
        shares(2, [1.0, 1.0, 1.0])
