"""Slices of a model's layers. A slice may begin or end inside a layer, between attention and feed-forward, so that stages can be of
more equal length than whole layers allow."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

HALVES = 2
"""The number of halves of a layer."""


class LayerPart(Enum):
    """What is held or computed of a layer. Each half includes its norm and its residual connection."""

    WHOLE = "whole"
    ATTENTION = "attention"
    FEED_FORWARD = "feed-forward"

    def holds(self, name: str) -> bool:
        """Returns whether this part has the parameter or buffer `name` of a layer, e.g. attention_norm.weight."""
        return self is LayerPart.WHOLE or name.startswith("feed_forward") == (self is LayerPart.FEED_FORWARD)

    def again(self, recompute: str) -> str:
        """Returns what the backward pass of this part computes again if its layer is to compute `recompute` again (none, attention,
        experts or full): of a half, none or full."""
        if self is LayerPart.WHOLE:
            return recompute
        own = "attention" if self is LayerPart.ATTENTION else "experts"
        return "full" if recompute in ("full", own) else "none"


IN_ORDER = (LayerPart.ATTENTION, LayerPart.FEED_FORWARD)
"""The halves of a layer, in the order in which a forward pass computes them."""


@dataclass(frozen=True, order=True)
class LayerSlice:
    """The half layers from `start` to before `stop`. Half 2 * i is the attention of layer i; half 2 * i + 1 is its feed-forward,
    which may be a mixture of experts."""

    start: int
    stop: int

    @staticmethod
    def of_layers(layers: range) -> "LayerSlice":
        """Returns the slice of these whole layers."""
        return LayerSlice(HALVES * layers.start, HALVES * layers.stop)

    @property
    def whole(self) -> bool:
        """Whether the slice consists of whole layers."""
        return self.start % HALVES == self.stop % HALVES == 0

    @property
    def count(self) -> int | float:
        """The number of layers, e.g. 4 or 4.5."""
        layers, half = divmod(self.stop - self.start, HALVES)
        return layers + 0.5 if half else layers

    def parts(self) -> dict[int, LayerPart]:
        """Returns what the slice, which is not empty, holds of each of its layers, in order."""
        found = dict.fromkeys(range(self.start // HALVES, -(-self.stop // HALVES)), LayerPart.WHOLE)
        if self.start % HALVES:
            found[self.start // HALVES] = LayerPart.FEED_FORWARD
        if self.stop % HALVES:
            found[self.stop // HALVES] = LayerPart.ATTENTION
        return found

    def __str__(self) -> str:
        """Names the layers for a person, e.g. 0-3, or 0-3 and attention of 4."""
        parts, named = self.parts(), []
        for part, grouped in groupby(parts, key=lambda layer: parts[layer]):
            layers = list(grouped)
            named.append(f"{layers[0]}-{layers[-1]}" if part is LayerPart.WHOLE else f"{part.value} of {layers[0]}")
        return " and ".join(named)


def parts_of(slices: Iterable[LayerSlice]) -> dict[int, LayerPart]:
    """Returns what a rank with these slices holds of each of its layers, in the order of the slices. Both halves of a layer, even
    in different slices, are a whole layer."""
    found: dict[int, LayerPart] = {}
    for one in slices:
        for layer, part in one.parts().items():
            found[layer] = LayerPart.WHOLE if layer in found else part
    return found


def cut_inside(slices: Iterable[LayerSlice]) -> bool:
    """Returns whether any of the slices begins or ends inside a layer."""
    return not all(one.whole for one in slices)
