"""Micro-batches for replicas of unequal speed. Free of torch."""

from collections.abc import Sequence
from fractions import Fraction

from bagualu.comm.errors import RecipeError


def shares(total_micro_batches: int, speeds: Sequence[float]) -> list[int]:
    """How many of `total_micro_batches` each replica takes so that the slowest is done as early as can be; each takes at least one.

    Each further micro-batch goes to the replica that would be done with it first: as the time of the one that is done last never
    falls, no other order ends earlier. Exact, in fractions; among equals the first. Raises RecipeError for fewer micro-batches than
    replicas.
    """
    if total_micro_batches < len(speeds):
        raise RecipeError(f"{total_micro_batches} micro-batches are fewer than {len(speeds)} replicas; give train.micro_batch a "
                          f"smaller value, or parallel.data={total_micro_batches} or less")  # fmt: skip
    seconds = [1 / Fraction(speed) for speed in speeds]
    counts = [1] * len(seconds)
    for _ in range(total_micro_batches - len(seconds)):
        next_done = [(count + 1) * each for count, each in zip(counts, seconds, strict=True)]
        counts[next_done.index(min(next_done))] += 1
    return counts
