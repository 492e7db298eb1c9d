"""FLOPs of the decoder's forward pass, layer by layer: the one formula behind MFU and analytic costs.

Convention: that of PaLM (Chowdhery et al. 2022, appendix B: 2 FLOPs for each weight a token is multiplied with, plus attention),
and where PaLM leaves it open or counts too much:
- the embedding lookup multiplies nothing and is left out; the head counts, with the vocabulary without padding;
- causal attention counts what is needed, without a window (S + 1) / 2 keys for the average token, where PaLM counts all S;
- of the experts only those a token passes count (top k and shared), and the router;
- with low-rank factors (model.lora), the weights beside them have no gradient, and the factors count.
Norms, activations, rotary positions and softmax are left out. A product's backward pass costs it twice: once for the gradient of
its input, once for that of its weight; attention's own products have two inputs and no weight.
"""

from dataclasses import dataclass
from math import prod

from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.lora import FIRST, SECOND
from bagualu.trainer.models.decoder.shapes import layer_shapes


@dataclass(frozen=True)
class Flops:
    """FLOPs of a layer for one token: the fields count the forward pass; properties derive the backward pass and the total."""

    weights: float
    """FLOPs of products with weights in the forward pass."""
    attention: float = 0.0
    """FLOPs of attention scores and of their product with the values in the forward pass."""
    trained: float | None = None
    """FLOPs of those products with weights that are trained, in the forward pass; None: of all."""

    @property
    def forward(self) -> float:
        return self.weights + self.attention

    @property
    def input_gradient(self) -> float:
        return self.weights + 2 * self.attention

    @property
    def weight_gradient(self) -> float:
        return self.weights if self.trained is None else self.trained

    @property
    def total(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient

    def plus(self, other: "Flops") -> "Flops":
        none = self.trained is None and other.trained is None
        trained = None if none else self.weight_gradient + other.weight_gradient
        return Flops(self.weights + other.weights, self.attention + other.attention, trained)


def model_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Returns the FLOPs of the whole model's forward and backward pass for one token of a sequence of `sequence_length` tokens."""
    layers = sum(layer_flops(model, layer, sequence_length).total for layer in range(model.layers))
    return layers + head_flops(model).total


def attention_flops(model: ModelConfig, layer: int, sequence_length: int) -> Flops:
    """Returns the FLOPs of the attention of `layer` (from 0), with its projections, for a token of a sequence of `sequence_length`
    tokens."""
    head_width, key_value_width = model.heads * model.head_width, model.key_value_heads * model.head_width
    projections = 2 * model.hidden * (2 * head_width + 2 * key_value_width)
    window = min(model.window_of(layer) or sequence_length, sequence_length)
    keys = window - window * (window - 1) / (2 * sequence_length)  # the first tokens of a sequence have fewer before them
    factors = _factor_flops(model, layer, "attention.")
    return Flops(projections + (factors or 0.0), 2 * (2 * head_width * keys), factors)


def layer_flops(model: ModelConfig, layer: int, sequence_length: int) -> Flops:
    """Returns the FLOPs of decoder layer `layer` (from 0) for a token of a sequence of `sequence_length` tokens."""
    return attention_flops(model, layer, sequence_length).plus(feed_forward_flops(model, layer))


def feed_forward_flops(model: ModelConfig, layer: int) -> Flops:
    """Returns the FLOPs of the feed-forward, or mixture of experts, of `layer` (from 0) for a token."""
    unit = (3 if model.gated else 2) * 2 * model.hidden  # for each unit of a feed-forward's width
    if model.is_moe_layer(layer):
        moe = model.moe
        feed_forward = unit * moe.ffn * (moe.top_k + moe.shared_experts) + 2 * model.hidden * moe.experts
    else:
        feed_forward = unit * model.ffn
    factors = _factor_flops(model, layer, "feed_forward.")
    return Flops(feed_forward + (factors or 0.0), trained=factors)


def _factor_flops(model: ModelConfig, layer: int, block: str) -> float | None:
    """Returns the FLOPs of products with the low-rank factors of a block of `layer` for a token; None if the model has none, so
    that its weights are trained."""
    if model.lora.rank is None:
        return None
    shapes = layer_shapes(model, layer).items()
    factors = [shape for name, shape in shapes if name.startswith(block) and name.endswith((FIRST, SECOND))]
    return float(sum(2 * prod(shape[-2:]) * (model.moe.top_k if len(shape) == 3 else 1) for shape in factors))


def head_flops(model: ModelConfig) -> Flops:
    """Returns the FLOPs of the head, the projection to the vocabulary without padding, for one token."""
    return Flops(float(2 * model.hidden * model.vocab), trained=None if model.lora.rank is None else 0.0)
