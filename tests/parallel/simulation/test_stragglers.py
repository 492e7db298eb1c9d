"""The slowest of many ranks."""

from math import pi, sqrt
from random import Random

import pytest

from bagualu.parallel.simulation.stragglers import expected_maximum, sampled_maximum, slowest_paces


@pytest.mark.parametrize(
    ("samples", "mean"),
    [(1, 0.0), (2, 1 / sqrt(pi)), (3, 1.5 / sqrt(pi)), (10, 1.5387527308351696), (1000, 3.2414357691)],
)
def test_the_mean_of_the_largest_is_that_of_the_tables(samples: int, mean: float) -> None:
    """Harter, Biometrika 48, 1961, table 1."""
    assert expected_maximum(samples) == pytest.approx(mean, abs=1e-10)


@pytest.mark.parametrize("samples", [1, 7, 131072])
def test_samples_have_the_mean_of_the_largest(samples: int) -> None:
    generator = Random(1)
    drawn = [sampled_maximum(samples, generator) for _ in range(5_000)]
    deviation = 1.0 if samples == 1 else 0.7
    assert sum(drawn) / len(drawn) == pytest.approx(expected_maximum(samples), abs=5 * deviation / sqrt(len(drawn)))


def test_more_ranks_are_held_up_longer_and_a_seed_repeats_its_sample() -> None:
    assert slowest_paces([1, 8], 0.0, None) == [1.0, 1.0]
    one, few, many = slowest_paces([1, 8, 4096], 0.02, None)
    assert one == pytest.approx(1.0)
    assert 1.02 < few < many < 1.09
    assert slowest_paces([64, 64], 0.02, 3) == slowest_paces([64, 64], 0.02, 3) != slowest_paces([64, 64], 0.02, 4)
    first, second = slowest_paces([64, 64], 0.02, 3)
    assert first != second
