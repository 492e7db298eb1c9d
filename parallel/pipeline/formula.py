"""What the papers say that a schedule costs, as functions beside the words. Free of torch.

Costs are those of one pass of one stage: F forward, I and W the two parts of the backward pass, B = I + W. p is the number of
ranks, v the chunks of each, m the micro-batches; a rank works m v (F + B).

The bubble is the time that the rank which is at it the longest waits, from its own first pass to its own last: what the papers of
the zero-bubble schedules count (arXiv 2401.10241). Activations in flight are counted in forward passes of a stage that are held;
one is 1/v of what a rank would hold of a micro-batch, so peaks of schedules with different v compare after division by it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bagualu.parallel.pipeline.timeline import Time, share


@dataclass(frozen=True)
class Size:
    """A pipeline, and what its passes take."""

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
        """What a rank works."""
        return self.micro_batches * self.chunks * (self.forward + self.backward)

    @property
    def even(self) -> bool:
        return self.forward == self.input_gradient == self.weight_gradient


@dataclass(frozen=True)
class Formula:
    """The published cost of a schedule."""

    bubble_text: str
    bubble: Callable[[Size], Time | None]
    """A time; None where nothing is published for this size."""
    peak_text: str
    peak: Callable[[Size], int]
    """The most forward passes, of all stages of a rank, whose activations any rank holds at once."""
    bound: bool = False
    """Whether the bubble is at most this, not exactly."""
    least: Callable[[int], int] = lambda ranks: 1
    """The fewest micro-batches from which on the bubble, and a peak that does not fall short, are these."""

    def share(self, size: Size) -> Time | None:
        """The bubble as a share of the time of the rank that is at it the longest."""
        bubble = self.bubble(size) if size.micro_batches >= self.least(size.ranks) else None
        return None if bubble is None else share(bubble, bubble + size.work)
