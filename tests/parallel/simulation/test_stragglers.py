"""The slowest of many ranks."""

from math import pi, sqrt

import pytest

from bagualu.parallel.simulation.stragglers import expected_maximum, slowest_paces


@pytest.mark.parametrize(
    ("samples", "mean"),
    [(1, 0.0), (2, 1 / sqrt(pi)), (3, 1.5 / sqrt(pi)), (10, 1.5387527308351696), (1000, 3.2414357691)],
)
def test_the_mean_of_the_largest_is_that_of_the_tables(samples: int, mean: float) -> None:
    """Harter, Biometrika 48, 1961, table 1."""
    assert expected_maximum(samples) == pytest.approx(mean, abs=1e-10)


def test_more_ranks_are_held_up_longer() -> None:
    assert slowest_paces([1, 8], 0.0) == [1.0, 1.0]
    one, few, many = slowest_paces([1, 8, 4096], 0.02)
    assert one == pytest.approx(1.0)
    assert 1.02 < few < many < 1.09
