"""How much slower than a usual rank the slowest of a role is. Ranks differ by chance, and the slowest holds up all others."""

from math import expm1, log
from random import Random
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


def sampled_maximum(samples: int, generator: Random) -> float:
    """Returns a random number with the distribution of the largest of `samples` independent standard normal numbers: the quantile
    u^(1/n) for a uniform u."""
    uniform = (generator.getrandbits(52) + 0.5) / 2**52
    return -_NORMAL.inv_cdf(-expm1(log(uniform) / samples))


def slowest_paces(ranks: list[int], deviation: float, seed: int | None) -> list[float]:
    """Returns, for roles of so many `ranks`, by how much their slowest rank takes longer than a usual one, as a factor.

    The time of each rank is normally distributed with this standard `deviation`, as a fraction of its mean. `seed` None: the mean
    of the slowest; else a sample of it, always the same.
    """
    if not deviation:
        return [1.0] * len(ranks)
    generator = Random(seed)
    largest = [expected_maximum(count) if seed is None else sampled_maximum(count, generator) for count in ranks]
    return [max(0.0, 1 + deviation * most) for most in largest]
