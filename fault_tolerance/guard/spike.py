"""Determines whether a step's loss or gradient norm is a spike compared with the steps before.

    usual bar   factor x exp(5 x scatter) x median of the window
    large       the third largest of the window's newest three quarters (of a window of 64)
    alike       the median of the newest hard values; a value above the usual bar or factor x large is hard

A step is a spike when its value is above factor x large, or above both the usual bar and sqrt(factor) x large; but not when it
is at most sqrt(factor) x alike.

The scatter is that of the logarithms: the median deviation from their median, or the median change between steps if that is
smaller, as it is while the loss falls. `large` and `alike` are for corpora in which easy and hard text alternate: there the median
is that of the easy text, and the scatter around it is much too small or much too large. Hard values count when at least four of
them are in the last four windows, or when the steps just before were hard too (another kind of text begins). A single step does not
raise a bar. The factor is a wide margin, so that sums which differ in their last digits between layouts give the same decision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

_SCATTER = 5.0
_LARGEST = 0.05
"""Position of `large`, counted from the largest value (1 is the largest), as a fraction of the window's size; at least 2."""
_HARD_WINDOWS, _HARD_LEAST, _HARD_NEWEST = 4, 4, 8
IN_A_ROW = 2
"""After this many hard steps in a row, the next step may be as hard as recent hard steps without being a spike."""


@dataclass
class History:
    """The newest `window` positive values of the loss or the gradient norm. Before a quarter of `window` values (at least 4) exist,
    nothing is a spike."""

    window: int
    values: list[float] = field(default_factory=list)
    """Values of committed steps, oldest first."""
    hard: list[tuple[int, float]] = field(default_factory=list)
    """(step, value) of the steps of the last four windows in which this value was hard, including steps whose samples were
    deferred."""

    def stands_out(self, value: float, factor: float, step: int = 0, row: int = 0) -> bool:
        """Returns whether `value` at `step` is a spike. Always False if `factor` is 0, `value` is not finite and positive, or there
        are too few values yet.

        `row` is the number of hard steps in a row just before.
        """
        if not self._judges(value, factor):
            return False
        margin, large = math.sqrt(factor), self._large()  # similar text needs a smaller margin than easy and hard text
        far = value > factor * large or (value > margin * large and self._above_usual(value, factor))
        return far and not self._is_like_others(value, margin, step, row)

    def is_hard(self, value: float, factor: float) -> bool:
        """Returns whether `value` is hard: above the usual bar or `factor` x large. False where `stands_out` cannot judge."""
        return self._judges(value, factor) and (value > factor * self._large() or self._above_usual(value, factor))

    def add(self, value: float) -> None:
        """Records the value of a committed step; a value of 0 is left out."""
        if value > 0:  # zero has no logarithm, and a gradient of zero is no measure for spikes
            self.values = [*self.values, value][-self.window :]

    def add_hard(self, step: int, value: float) -> None:
        """Records `value` for `step`, which was hard without a fault of the hardware."""
        self.hard = [*self._recent(step), (step, value)]

    def load(self, values: Sequence[float], hard: Sequence[Sequence[float]] = ()) -> None:
        """Replaces the history by saved `values`, of which the newest `window` are kept, and saved `hard`, pairs (step, value)."""
        self.values = list(values)[-self.window :]
        self.hard = [(int(step), float(value)) for step, value in hard]

    def _judges(self, value: float, factor: float) -> bool:
        return factor > 0 and len(self.values) >= max(4, self.window // 4) and math.isfinite(value) and value > 0

    def _large(self) -> float:
        newest = self.values[-max(4, 3 * self.window // 4) :]
        return sorted(newest)[-max(2, int(_LARGEST * self.window))]

    def _above_usual(self, value: float, factor: float) -> bool:
        logs = [math.log(value) for value in self.values]
        middle = median(logs)
        return math.log(value) - middle > math.log(factor) + _SCATTER * _scatter(logs, middle)

    def _recent(self, step: int) -> list[tuple[int, float]]:
        return [pair for pair in self.hard if pair[0] > step - _HARD_WINDOWS * self.window]

    def _is_like_others(self, value: float, margin: float, step: int, row: int) -> bool:
        others = [value for _, value in self._recent(step)]
        enough = len(others) >= _HARD_LEAST or (others and row >= IN_A_ROW)
        return bool(enough) and value <= margin * median(others[-_HARD_NEWEST:])


def _scatter(logs: Sequence[float], middle: float) -> float:
    """Returns the smaller of two measures of scatter: around `middle`, and between consecutive values.

    For values without a trend they are equal on average; with a trend, the second one is smaller.
    """
    level = median(abs(value - middle) for value in logs)
    steps = median(abs(after - before) for before, after in pairwise(logs))
    return min(level, steps / math.sqrt(2.0))
