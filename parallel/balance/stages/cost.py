"""The time and memory that each layer of a model costs for a micro-batch.

Embedding and head are layers too: the first stage holds the embedding besides its decoder layers, the last stage the head, which
includes the loss. The trainer measures the costs or computes them from shapes.
"""

import json
from dataclasses import asdict, dataclass, field


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
    attention_seconds: float = 0.0
    """The part of forward_seconds for attention and its norm. The rest is for the feed-forward or the mixture of experts."""
    attention_bytes: int = 0
    """The part of activation_bytes for attention and its norm, their input included."""
    work_bytes: int = 0
    """The most memory that the layer takes besides activation_bytes while one of its passes runs: gradients of activations and
    intermediate results."""

    def again_seconds(self, recompute: str) -> float:
        """Returns the time in which the backward pass computes activations again. `recompute` is the part of the layer that it
        computes again: none, attention, experts or full."""
        return {"none": 0.0, "attention": self.attention_seconds, "experts": self.forward_seconds - self.attention_seconds,
                "full": self.forward_seconds}[recompute]  # fmt: skip

    def kept_bytes(self, recompute: str) -> int:
        """Returns what is left of activation_bytes if the part `recompute` of the layer is computed again from its input."""
        return {"none": self.activation_bytes, "attention": self.activation_bytes - self.attention_bytes + self.input_bytes,
                "experts": self.attention_bytes + self.input_bytes, "full": self.input_bytes}[recompute]  # fmt: skip

    def working_bytes(self, recompute: str) -> int:
        """Returns the most bytes of activations that the layer takes during its own backward pass."""
        return max(self.kept_bytes(recompute), self.attention_bytes) if recompute == "attention" else self.activation_bytes


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
        layers = [LayerCost(**layer) for layer in raw["layers"]]
        embedding, head = LayerCost(**raw["embedding"]), LayerCost(**raw["head"])
        return CostTable(embedding, layers, head, raw["source"], raw["tied_bytes"], raw["output_bytes"], raw["reserved_bytes"])
