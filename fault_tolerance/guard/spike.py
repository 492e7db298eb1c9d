"""When a figure of a step stands out from the steps before it. Free of torch.

The rule looks at logarithms: a step stands out when it lies above the median of a window by the log of a factor plus five times
the window's own scatter (median absolute deviation). Both are robust: a noisy stretch raises the bar, single steps do not. The
factor is a margin: figures that are nearly equal are never on both sides of it, so sums that differ in their last digits between
layouts do not decide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

_SCATTER = 5.0


@dataclass
class History:
    """The newest `window` values of one figure, all positive; it judges once it has seen a quarter of them."""

    window: int
    values: list[float] = field(default_factory=list)

    def stands_out(self, value: float, factor: float) -> bool:
        """Whether `value` lies too far above what was; `factor` 0 never says so. Not finite: no."""
        if factor <= 0 or len(self.values) < max(4, self.window // 4) or not (math.isfinite(value) and value > 0):
            return False
        logs = [math.log(one) for one in self.values]
        middle = median(logs)
        scatter = median(abs(one - middle) for one in logs)
        return math.log(value) - middle > math.log(factor) + _SCATTER * scatter

    def add(self, value: float) -> None:
        """A step with this value was committed."""
        if value > 0:  # a gradient of zero has no logarithm and says nothing about spikes
            self.values = [*self.values, value][-self.window :]

    def load(self, values: Sequence[float]) -> None:
        """Go on from what `values` held."""
        self.values = list(values)[-self.window :]
