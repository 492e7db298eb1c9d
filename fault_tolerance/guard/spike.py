"""When a figure of a step stands out from the steps before it. Free of torch.

    usual bar   factor x exp(5 x scatter) x median of the window
    large       the third largest of the window's newest three quarters (of a window of 64)
    alike       the median of the newest hard values; hard is a value above the usual bar or factor x large

A step stands out when its value is above factor x large, or above both the usual bar and sqrt(factor) x large; but not when it
is at most sqrt(factor) x alike.

The scatter is that of the logarithms: the median deviation from their median, or from one step to the next if that is less, as
it is while the figure falls. The other two bars are for text that is easy and hard in turn: the median is that of the easy text
then, and the scatter around it is next to nothing, or hides everything. Hard values count when four of them are among the last
four windows, or when the steps just before were hard too (another kind of text begins). Single steps raise no bar. The factor
is a margin: figures that are nearly equal are never on both sides of a bar, so sums that differ in their last digits between
layouts do not decide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

_SCATTER = 5.0
_LARGEST = 0.05
"""Share of the window that must be as large as a value, but for a margin, for the value to be usual; at least two values."""
_HARD_WINDOWS, _HARD_LEAST, _HARD_NEWEST = 4, 4, 8
IN_A_ROW = 2
"""Steps in a row that were hard, after which the next one may be."""


@dataclass
class History:
    """The newest `window` values of one figure, all positive; it judges once it has seen a quarter of them."""

    window: int
    values: list[float] = field(default_factory=list)
    """Of committed steps."""
    hard: list[tuple[int, float]] = field(default_factory=list)
    """(step, value) of the steps above the usual, also of those whose samples were deferred."""

    def stands_out(self, value: float, factor: float, step: int = 0, row: int = 0) -> bool:
        """Whether `value` lies too far above what was; `factor` 0 never says so. Not finite: no. `row`: hard steps just before."""
        if not self._judges(value, factor):
            return False
        margin, large = math.sqrt(factor), self._large()  # among its like a value scatters less than between easy and hard
        far = value > factor * large or (value > margin * large and self._above_usual(value, factor))
        return far and not self._is_like_others(value, margin, step, row)

    def is_hard(self, value: float, factor: float) -> bool:
        """Whether `value` lies far above most of the window. Not finite: no."""
        return self._judges(value, factor) and (value > factor * self._large() or self._above_usual(value, factor))

    def add(self, value: float) -> None:
        """A step with this value was committed."""
        if value > 0:  # a gradient of zero has no logarithm and says nothing about spikes
            self.values = [*self.values, value][-self.window :]

    def add_hard(self, step: int, value: float) -> None:
        """`step` was hard, and nothing was wrong with the hardware."""
        self.hard = [*self._recent(step), (step, value)]

    def load(self, values: Sequence[float], hard: Sequence[Sequence[float]] = ()) -> None:
        """Go on from what `values` and `hard` held."""
        self.values = list(values)[-self.window :]
        self.hard = [(int(step), float(value)) for step, value in hard]

    def _judges(self, value: float, factor: float) -> bool:
        return factor > 0 and len(self.values) >= max(4, self.window // 4) and math.isfinite(value) and value > 0

    def _large(self) -> float:
        newest = self.values[-max(4, 3 * self.window // 4) :]
        return sorted(newest)[-max(2, int(_LARGEST * self.window))]

    def _above_usual(self, value: float, factor: float) -> bool:
        logs = [math.log(one) for one in self.values]
        middle = median(logs)
        return math.log(value) - middle > math.log(factor) + _SCATTER * _scatter(logs, middle)

    def _recent(self, step: int) -> list[tuple[int, float]]:
        return [one for one in self.hard if one[0] > step - _HARD_WINDOWS * self.window]

    def _is_like_others(self, value: float, margin: float, step: int, row: int) -> bool:
        others = [value for _, value in self._recent(step)]
        enough = len(others) >= _HARD_LEAST or (others and row >= IN_A_ROW)
        return bool(enough) and value <= margin * median(others[-_HARD_NEWEST:])


def _scatter(logs: Sequence[float], middle: float) -> float:
    """Robust against a trend: the smaller of two measures that are the same on average for values without one."""
    level = median(abs(one - middle) for one in logs)
    steps = median(abs(after - before) for before, after in pairwise(logs))
    return min(level, steps / math.sqrt(2.0))
