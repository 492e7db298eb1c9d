"""Divides micro-batches among replicas of unequal speed."""

from collections.abc import Sequence
from fractions import Fraction

from bagualu.comm.errors import RecipeError


def shares(total_micro_batches: int, speeds: Sequence[float]) -> list[int]:
    """Returns the number of micro-batches of each replica, at least one each, such that the replica that ends last ends as early as
    possible. `speeds` are relative to one another.

    Each further micro-batch goes to the replica that would finish it first; if several would finish it at the same time, to the
    first of them. This is optimal, because the latest end never decreases as micro-batches are added. Fractions make the result
    exact. Raises RecipeError if there are fewer micro-batches than replicas.
    """
    if total_micro_batches < len(speeds):
        raise RecipeError(f"{total_micro_batches} micro-batches are fewer than {len(speeds)} replicas; give train.micro_batch a "
                          f"smaller value, or parallel.data={total_micro_batches} or less")  # fmt: skip
    seconds = [1 / Fraction(speed) for speed in speeds]
    counts = [1] * len(seconds)
    for _ in range(total_micro_batches - len(seconds)):
        next_end = [(count + 1) * each for count, each in zip(counts, seconds, strict=True)]
        counts[next_end.index(min(next_end))] += 1
    return counts
