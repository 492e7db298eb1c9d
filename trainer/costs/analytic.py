"""Computes a model's cost table from its shapes, without running anything.

Seconds are FLOPs (models/decoder/flops.py) at 1 TFLOP/s: their ratios are right as far as matrix products dominate the time. Bytes
are exact for weights, gradients and optimizer state; for activations they count what the layers keep for their backward pass.

The head computes its gradients in its forward pass (parallel/vocabulary.py). So all of its time counts as forward, and it holds the
gradient of its weight for every micro-batch in flight.

Shapes: T tokens of a micro-batch, H hidden, A width of all heads, C width of keys and values, F feed-forward, E experts, K experts
per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from bagualu.parallel.balance.stages.cost import CostTable, LayerCost
from bagualu.parallel.config import HEAD_CHUNK_TOKENS
from bagualu.parallel.layout import SHARD, Layout
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.flops import attention_flops, head_flops, layer_flops
from bagualu.trainer.models.decoder.plan import decoder_plan
from bagualu.trainer.models.decoder.shapes import layer_buffers, layer_shapes

FLOPS_PER_SECOND = 1e12
_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelWork:
    """The properties of a rank's work on which its costs depend."""

    model: ModelConfig
    layout: Layout
    sequence_length: int
    micro_batch: int
    dtype: str
    zero: int = 1
    """ZeRO stage: 0 replicates the optimizer state over the data ranks, 1 partitions it, 2 also partitions most gradients, 3 all
    gradients and weights."""
    sequence: bool = False
    """Whether sequence parallelism is on."""
    moments: Mapping[str, int] = field(default_factory=dict)
    """The number of moments that the optimizer keeps of each parameter, by name; two of a parameter that is not in it."""
    half_moments: bool = False
    """Whether moments are bfloat16 rather than in the dtype of master weights."""
    frozen: frozenset[str] = frozenset()
    """The names of parameters that are not trained."""

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence_length

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]

    def moment_bytes(self, name: str) -> int:
        """Returns the bytes of all moments of an element of the parameter `name`; 0 for a frozen one."""
        return 0 if name in self.frozen else self.moments.get(name, 2) * (2 if self.half_moments else self.accurate_bytes)

    @property
    def accurate_bytes(self) -> int:
        """Bytes per element of gradients, master weights, moments and norm statistics, which are at least float32."""
        return max(4, self.item_bytes)


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds in a layer for one micro-batch; the fields are those of LayerCost."""

    activation_bytes: int
    input_bytes: int
    operand_bytes: int
    attention_bytes: int = 0


def analytic_table(work: ModelWork) -> CostTable:
    """Returns the costs of every layer of `work`, embedding and head included, for a rank that holds it and a micro-batch."""
    model, tensor = work.model, work.layout.tensor
    embedding_bytes, head_bytes, tied_bytes = end_bytes(work)
    embedding = LayerCost("embedding", 0.0, 0.0, 0.0, embedding_bytes, *_in_order(embedding_held(work)))
    head = LayerCost("head", _seconds(work, head_flops(model).total) / tensor, 0.0, 0.0, head_bytes, *_in_order(head_held(work)))
    layers = [_layer(work, index) for index in range(model.layers)]
    return CostTable(embedding, layers, head, "FLOPs at 1 TFLOP/s", tied_bytes)


def _layer(work: ModelWork, index: int) -> LayerCost:
    flops, held = layer_flops(work.model, index, work.sequence_length), layer_held(work, index)
    attention = attention_flops(work.model, work.sequence_length)
    return LayerCost(
        f"layer {index}",
        _seconds(work, flops.forward) / work.layout.tensor,
        _seconds(work, flops.input_gradient) / work.layout.tensor,
        _seconds(work, flops.weight_gradient) / work.layout.tensor,
        layer_bytes(work, index),
        *_in_order(held),
        _seconds(work, attention.forward) / work.layout.tensor,
        held.attention_bytes,
    )


def _seconds(work: ModelWork, flops_per_token: float) -> float:
    return flops_per_token * work.tokens / FLOPS_PER_SECOND


def _in_order(held: Held) -> tuple[int, int, int]:
    return held.activation_bytes, held.input_bytes, held.operand_bytes


def layer_bytes(work: ModelWork, index: int) -> int:
    """Returns the bytes of a decoder layer's weights, gradients, optimizer state and buffers on a rank."""
    buffers = sum(prod(shape) for shape in layer_buffers(work.model, index).values()) * work.accurate_bytes
    trained = layer_shapes(work.model, index).items()
    return buffers + sum(_state_bytes(work, f"layers.{index}.{name}", shape) for name, shape in trained)


def saved_bytes(work: ModelWork, index: int) -> int:
    """Returns the bytes of a whole decoder layer, over all ranks, in a checkpoint: its master weights, moments and buffers."""
    shapes = {f"layers.{index}.{name}": shape for name, shape in layer_shapes(work.model, index).items()}
    moments = sum(prod(shape) * work.moment_bytes(name) for name, shape in shapes.items())
    buffers = sum(prod(shape) for shape in layer_buffers(work.model, index).values())
    weights = sum(map(prod, shapes.values()))
    return (weights + buffers) * work.accurate_bytes + moments


def end_bytes(work: ModelWork) -> tuple[int, int, int]:
    """Returns three numbers of bytes of state on a rank: of the embedding, of the head with the final norm, and those that both
    include but that exist only once if the same rank holds both (0 unless embeddings are tied)."""
    vocabulary = (work.model.padded_vocab, work.model.hidden)
    embedding = _state_bytes(work, "embedding.weight", vocabulary)
    head = _state_bytes(work, "head.weight", vocabulary) + _state_bytes(work, "norm.weight", (work.model.hidden,))
    return embedding, head, embedding if work.model.tie_embeddings else 0


def _state_bytes(work: ModelWork, name: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes of a parameter's working weight, its gradient, and a rank's part of its moments and, if the working weight
    is 16-bit, of its master weight; of a frozen one only the working weight."""
    plan = decoder_plan(work.model, work.sequence)
    name = plan.global_name(name)
    placement = plan.placement(name)
    elements = prod(placement.box(name, shape, work.layout, work.layout.coordinates(0)).shape)
    if work.zero == 3:
        return _divided_bytes(work, name, elements, work.layout.size(placement.reduction_axis + SHARD))
    if name in work.frozen:
        return elements * work.item_bytes
    share = work.layout.size(placement.reduction_axis) if work.zero else 1
    over_two_axes = (placement.partial_over is not None and work.layout.size(placement.partial_over) > 1) or (
        name == "embedding.weight" and work.model.tie_embeddings and work.layout.pipeline > 1
    )
    masters = work.item_bytes < work.accurate_bytes
    gradients = elements * work.accurate_bytes // (share if work.zero >= 2 and not over_two_axes else 1)
    optimizer = elements * (work.accurate_bytes * masters + work.moment_bytes(name))
    return elements * work.item_bytes + gradients + optimizer // share


def _divided_bytes(work: ModelWork, name: str, elements: int, share: int) -> int:
    """Returns the bytes of a rank's part of a parameter of `elements` elements that `share` ranks divide: the weight, which the
    optimizer updates, its gradient and moments. A rank of a pipeline holds the working weights of its stages whole too. Not
    counted: a layer whose weights are gathered for a single pass."""
    item, wide = work.item_bytes, work.accurate_bytes
    if share == 1:  # nothing is divided or gathered
        masters = wide if item < wide else 0
        return elements * (item if name in work.frozen else item + wide + masters + work.moment_bytes(name))
    gathered = elements * item if work.layout.pipeline > 1 else 0
    return gathered + elements * (item if name in work.frozen else 2 * wide + work.moment_bytes(name)) // share


def embedding_held(work: ModelWork) -> Held:
    """Returns the bytes that the embedding holds: as activations the token ids, as operands the ids and the gradient of the
    output."""
    ids, between = 8 * work.tokens, work.tokens // (work.layout.tensor if work.sequence else 1)
    return Held(ids, ids, ids + between * work.model.hidden * work.item_bytes)


def head_held(work: ModelWork) -> Held:
    """Returns the bytes that the final norm and the head hold: the norm's input and scale, and the gradients of the loss with
    respect to the head's input and weight.

    The weight's gradient is in at least float32 if it is summed over chunks of tokens. On chips that do not multiply 16-bit
    matrices it always is, which this function does not take into account."""
    model, tensor = work.model, work.layout.tensor
    between = work.tokens // (tensor if work.sequence else 1)
    inputs, scales = between * model.hidden * work.item_bytes, between * work.accurate_bytes
    weight_bytes = work.accurate_bytes if work.tokens > HEAD_CHUNK_TOKENS else work.item_bytes
    gradients = work.tokens * model.hidden * work.item_bytes + model.padded_vocab // tensor * model.hidden * weight_bytes
    return Held(inputs + scales + gradients, inputs, 0)


def layer_held(work: ModelWork, index: int) -> Held:
    """Returns the bytes that a rank keeps of one micro-batch in a decoder layer until its backward passes are done. Under sequence
    parallelism, a rank holds only its slice of the sequence between blocks, but the whole sequence inside them."""
    model, tensor, item = work.model, work.layout.tensor, work.item_bytes
    heads, narrow = model.heads * model.head_dim // tensor, model.key_value_heads * model.head_dim // tensor
    between = work.tokens // (tensor if work.sequence else 1)
    norm = between * (model.hidden * item + work.accurate_bytes)  # input and scale
    # The projections' input; query, key and value, expanded to all heads; the result; the softmax statistics, if they are kept.
    attention = work.tokens * ((model.hidden + 4 * heads) * item + model.heads // tensor * work.accurate_bytes)
    attention_operands = work.tokens * (2 * model.hidden + 2 * heads + 2 * narrow) * item
    mixed = _mixture_held(work) if model.is_moe_layer(index) else _swiglu_held(work, work.tokens, model.ffn // tensor)
    held = 2 * norm + attention + mixed[0]
    return Held(held, between * model.hidden * item, attention_operands + mixed[1], norm + attention)


def _swiglu_held(work: ModelWork, rows: int, ffn: int) -> tuple[int, int]:
    """Returns (activation bytes, operand bytes): activations are the input, gate, silu(gate) and up; operands are the inputs of the
    products and the gradients of their outputs."""
    return rows * (work.model.hidden + 3 * ffn) * work.item_bytes, rows * (2 * work.model.hidden + 3 * ffn) * work.item_bytes


def _mixture_held(work: ModelWork) -> tuple[int, int]:
    """Returns (activation bytes, operand bytes) under an even load: the experts get K rows per token, the router keeps its input
    and probabilities, and the experts' results are kept for the gradients of their weights in the sum."""
    moe, tensor = work.model.moe, work.layout.tensor
    rows = work.tokens * moe.top_k
    experts = _swiglu_held(work, rows, moe.ffn // tensor)
    shared = _swiglu_held(work, work.tokens, moe.shared_experts * moe.ffn // tensor) if moe.shared_experts else (0, 0)
    router = work.tokens * ((work.model.hidden + 2 * moe.experts) * work.accurate_bytes)
    return experts[0] + shared[0] + router + rows * work.model.hidden * work.item_bytes, experts[1] + shared[1]
