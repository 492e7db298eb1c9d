"""How much slower than the mean rank the slowest of a role is. Ranks differ by chance, and the slowest holds up all others."""

from statistics import NormalDist

_STEP, _END = 0.01, 9.0
"""The grid of the integral, and where it ends, in standard deviations."""
_NORMAL = NormalDist()


def expected_maximum(samples: int) -> float:
    """Returns the mean of the largest of `samples` independent standard normal numbers.

    It is the integral of (1 if x > 0 else 0) - F(x)^n (David and Nagaraja, Order Statistics, section 3.1), by the trapezoid rule.
    """
    points = [index * _STEP for index in range(1, round(_END / _STEP) + 1)]
    both = sum(1 - _NORMAL.cdf(x) ** samples - _NORMAL.cdf(-x) ** samples for x in points)
    return _STEP * (both + 0.5 - 0.5**samples)


def slowest_paces(ranks: list[int], deviation: float) -> list[float]:
    """Returns, for roles of so many `ranks`, by how much their slowest rank takes longer than the mean rank, as a factor.

    The time of each rank is normally distributed with this standard `deviation`, as a fraction of its mean; the factor is that of
    the largest of so many samples, on average.
    """
    return [1 + deviation * expected_maximum(count) if deviation else 1.0 for count in ranks]
