"""The time and memory that each layer of a model costs for a micro-batch.

Embedding and head are layers too: the first stage holds the embedding besides its decoder layers, the last stage the head, which
includes the loss. A decoder layer has two halves, attention and feed-forward, which different stages may hold. The trainer measures
the costs or computes them from shapes.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from bagualu.parallel.pipeline.layer_slice import IN_ORDER, LayerPart


@dataclass(frozen=True)
class LayerCost:
    """The cost of a layer for a micro-batch, on the device whose speed is defined as 1.0."""

    name: str
    forward_seconds: float
    input_gradient_seconds: float
    weight_gradient_seconds: float
    state_bytes: int = 0
    """Memory that the layer takes all the time: its weights, their gradients, and this rank's part of the optimizer state."""
    activation_bytes: int = 0
    """Memory that the layer takes for each micro-batch from its forward pass to its backward pass or, if the backward pass is
    split, to the end of I (the input gradient)."""
    input_bytes: int = 0
    """The part of activation_bytes that the layer still takes if it recomputes all activations: its input."""
    operand_bytes: int = 0
    """Memory that the layer takes for each micro-batch between I (the input gradient) and W (the weight gradient), if the backward
    pass is split: the operands of W's matrix products."""
    work_bytes: int = 0
    """The most memory that the layer takes besides activation_bytes while one of its passes runs: gradients of activations and
    intermediate results."""
    halves: tuple["LayerCost", ...] = ()
    """The costs of attention, with its norm, and of the feed-forward or mixture of experts, with its norm, which `joined` adds up;
    empty for embedding and head, and if they are not known apart."""

    def again_seconds(self, recompute: str) -> float:
        """Returns the time in which the backward pass computes activations again. `recompute` is the part of the layer that it
        computes again: none, attention, experts or full."""
        if recompute in _HALF:
            return self.halves[_HALF[recompute]].forward_seconds
        return self.forward_seconds if recompute == "full" else 0.0

    def kept_bytes(self, recompute: str) -> int:
        """Returns what is left of activation_bytes if the part `recompute` of the layer is computed again from its input."""
        if recompute in _HALF:
            return self.activation_bytes - self.halves[_HALF[recompute]].activation_bytes + self.input_bytes
        return self.input_bytes if recompute == "full" else self.activation_bytes

    def working_bytes(self, recompute: str) -> int:
        """Returns the most bytes of activations that the layer takes during its own backward pass."""
        if recompute == "attention":
            return max(self.kept_bytes(recompute), self.halves[0].activation_bytes)
        return self.activation_bytes

    def part(self, part: LayerPart) -> "LayerCost":
        """Returns the cost of the layer or of one of its halves."""
        return self if part is LayerPart.WHOLE else self.halves[IN_ORDER.index(part)]


_HALF = {"attention": 0, "experts": 1}
"""The index in `LayerCost.halves` of the half that is computed again."""


def joined(name: str, attention: LayerCost, feed_forward: LayerCost) -> LayerCost:
    """Returns the cost of the layer of these halves. In its backward pass, attention works when what the feed-forward kept is
    freed."""
    return LayerCost(
        name,
        attention.forward_seconds + feed_forward.forward_seconds,
        attention.input_gradient_seconds + feed_forward.input_gradient_seconds,
        attention.weight_gradient_seconds + feed_forward.weight_gradient_seconds,
        attention.state_bytes + feed_forward.state_bytes,
        attention.activation_bytes + feed_forward.activation_bytes,
        attention.input_bytes,
        attention.operand_bytes + feed_forward.operand_bytes,
        max(feed_forward.work_bytes, attention.work_bytes - feed_forward.activation_bytes),
        (attention, feed_forward),
    )


@dataclass(frozen=True)
class CostTable:
    """The costs of a model. Embedding and head never recompute activations."""

    embedding: LayerCost
    layers: list[LayerCost]
    head: LayerCost
    source: str
    """The origin of the costs, for messages, e.g. "measured on 2 threads of ..."."""
    tied_bytes: int = 0
    """Bytes of state that embedding and head each include, but that exist only once if the same rank holds both."""
    output_bytes: int = 0
    """Bytes of a stage's output for a micro-batch, which the rank keeps until the backward pass of the stage; 0 after the head."""
    reserved_bytes: list[int] = field(default_factory=list)
    """For each pipeline rank, bytes that it takes besides what its layers take, such as those of transfers; empty: none."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "CostTable":
        """Returns the table that `to_json` has converted to `text`. Raises ValueError, KeyError or TypeError for text that
        `to_json` did not make."""
        raw = json.loads(text)
        layers = [_layer_cost(layer) for layer in raw["layers"]]
        embedding, head = _layer_cost(raw["embedding"]), _layer_cost(raw["head"])
        return CostTable(embedding, layers, head, raw["source"], raw["tied_bytes"], raw["output_bytes"], raw["reserved_bytes"])


def _layer_cost(raw: dict[str, Any]) -> LayerCost:
    return LayerCost(**{**raw, "halves": tuple(map(_layer_cost, raw["halves"]))})
