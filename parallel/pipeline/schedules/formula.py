"""The published cost of each schedule, as text and as functions.

The letters are times of a single pass of a stage: F forward, I input gradient, W weight gradient, B = I + W backward. p is the
number of ranks, v the chunks per rank, m the micro-batches; a rank computes for m v (F + B).

The bubble is the time for which the rank that takes longest waits between its own first and last pass. This is the definition of
the papers on zero-bubble schedules (arXiv 2401.10241). Activations in flight are counted in forward passes of a stage whose
activations are held. Each pass counts for 1/v of a rank's layers, so divide by v to compare schedules with different v.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

Time = float | int | Fraction


@dataclass(frozen=True)
class Size:
    """A pipeline's size and the durations of its passes."""

    ranks: int
    chunks: int
    micro_batches: int
    forward: Time = 1
    input_gradient: Time = 1
    weight_gradient: Time = 1

    @property
    def backward(self) -> Time:
        return self.input_gradient + self.weight_gradient

    @property
    def work(self) -> Time:
        """The time for which each rank computes in a step."""
        return self.micro_batches * self.chunks * (self.forward + self.backward)

    @property
    def even(self) -> bool:
        return self.forward == self.input_gradient == self.weight_gradient


@dataclass(frozen=True)
class Formula:
    """The published cost of a schedule."""

    bubble_text: str
    bubble: Callable[[Size], Time | None]
    """Returns the bubble as a time; None if no formula is published for this size."""
    peak_text: str
    peak: Callable[[Size], int]
    """Returns the most forward passes, of all stages of a rank, whose activations the rank holds at the same time."""
    bound: bool = False
    """Whether `bubble` returns an upper bound of the bubble rather than the exact bubble."""
    least: Callable[[int], int] = lambda ranks: 1
    """Returns, for a number of ranks, the least number of micro-batches for which `bubble` and `peak` hold."""

    def share(self, size: Size) -> Time | None:
        """Returns the bubble as a fraction of the time between the first and the last pass of the rank that takes longest; None if
        no formula is published for this size."""
        bubble = self.bubble(size) if size.micro_batches >= self.least(size.ranks) else None
        return None if bubble is None else share(bubble, bubble + size.work)


def share(part: Time, whole: Time) -> Time:
    """Returns part / whole, exact unless either is a float."""
    return part / whole if isinstance(part, float) or isinstance(whole, float) else Fraction(part) / Fraction(whole)
