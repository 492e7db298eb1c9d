"""What every layer of a model costs: time and memory of one micro-batch. Free of torch.

Embedding, head and loss are layers like any other: the first stage carries the embedding beside its decoder layers, the last one
the head. Where the figures come from (measured or computed from shapes) is the trainer's business.
"""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class LayerCost:
    """One layer on the device that counts as speed 1.0."""

    name: str
    forward_seconds: float
    input_gradient_seconds: float
    weight_gradient_seconds: float
    state_bytes: int = 0
    """Held all the time: weights, gradients, this rank's part of the optimizer's state."""
    activation_bytes: int = 0
    """Held for one micro-batch from its forward pass to its backward pass, or to the input-gradient part of it."""
    input_bytes: int = 0
    """The part of that which is kept where activations are computed again: the layer's input."""
    operand_bytes: int = 0
    """Held for one micro-batch between the two parts of its backward pass: what the products for the weights' gradients need."""


@dataclass(frozen=True)
class CostTable:
    """A whole model. With activations computed again, a layer's forward pass comes a second time at the start of its backward pass;
    embedding and head are never computed again."""

    embedding: LayerCost
    layers: list[LayerCost]
    head: LayerCost
    source: str
    """Where the figures come from, for the reader: e.g. "measured on 2 threads of ..."."""
    tied_bytes: int = 0
    """State counted in the embedding and again in the head that exists once where one rank holds both."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "CostTable":
        """Raises ValueError, KeyError or TypeError for anything but what to_json has written."""
        raw = json.loads(text)
        layers = [LayerCost(**layer) for layer in raw["layers"]]
        embedding, head = LayerCost(**raw["embedding"]), LayerCost(**raw["head"])
        return CostTable(embedding, layers, head, raw["source"], raw["tied_bytes"])
