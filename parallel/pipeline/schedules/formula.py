"""The published cost of each schedule, as text and as functions.

Costs are those of a single pass of a stage: F forward, I and W the two parts of the backward pass, B = I + W. p is the number of
ranks, v the chunks per rank, m the micro-batches; a rank computes for m v (F + B).

The bubble is the waiting time, between its own first and its own last pass, of the rank that takes longest, as the papers of the
zero-bubble schedules define it (arXiv 2401.10241). Activations in flight are counted in forward passes of a stage whose activations
are held. Each counts for 1/v of a rank's layers, so divide by v to compare schedules with different v.
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
        """The time that a rank computes."""
        return self.micro_batches * self.chunks * (self.forward + self.backward)

    @property
    def even(self) -> bool:
        return self.forward == self.input_gradient == self.weight_gradient


@dataclass(frozen=True)
class Formula:
    """The published cost of a schedule."""

    bubble_text: str
    bubble: Callable[[Size], Time | None]
    """The bubble as a time; None if none is published for this size."""
    peak_text: str
    peak: Callable[[Size], int]
    """The most forward passes, over all stages of a rank, whose activations a rank holds at the same time."""
    bound: bool = False
    """Whether `bubble` is an upper bound rather than exact."""
    least: Callable[[int], int] = lambda ranks: 1
    """The least number of micro-batches for which `bubble` holds and the peak reaches `peak`."""

    def share(self, size: Size) -> Time | None:
        """Returns the bubble as a fraction of that rank's time from its first to its last pass; None if there is no formula for
        this size."""
        bubble = self.bubble(size) if size.micro_batches >= self.least(size.ranks) else None
        return None if bubble is None else share(bubble, bubble + size.work)


def share(part: Time, whole: Time) -> Time:
    """Returns part / whole, exact unless either is a float."""
    return part / whole if isinstance(part, float) or isinstance(whole, float) else Fraction(part) / Fraction(whole)
