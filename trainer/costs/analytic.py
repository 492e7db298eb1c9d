"""Computes a model's cost table from its shapes, without running anything.

Seconds are FLOPs (models/decoder/flops.py) at 1 TFLOP/s: their ratios are right as far as matrix products dominate the time. Bytes
are exact for weights, gradients and optimizer state; activations.py has the formulas for activations.

The head computes its gradients in its forward pass (parallel/vocabulary.py). So all of its time counts as forward.
"""

from dataclasses import asdict, replace

from bagualu.parallel.balance.stages.cost import CostTable, LayerCost, joined
from bagualu.parallel.pipeline.layer_slice import LayerPart
from bagualu.trainer.costs.activations import Held, embedding_held, head_held, layer_held
from bagualu.trainer.costs.state import end_state, layer_state, parameter_state
from bagualu.trainer.costs.work import ModelWork
from bagualu.trainer.models.decoder.flops import Flops, attention_flops, feed_forward_flops, head_flops
from bagualu.trainer.models.decoder.shapes import layer_shapes

FLOPS_PER_SECOND = 1e12


def analytic_table(work: ModelWork) -> CostTable:
    """Returns the costs of every layer of `work`, embedding and head included, for a rank that holds it and a micro-batch."""
    model, tensor = work.model, work.layout.tensor
    embedding_bytes, head_bytes, tied_bytes = end_bytes(work)
    embedding = LayerCost("embedding", 0.0, 0.0, 0.0, embedding_bytes, **asdict(embedding_held(work)))
    head = LayerCost("head", _seconds(work, head_flops(model).total) / tensor, 0.0, 0.0, head_bytes, **asdict(head_held(work)))
    layers: list[LayerCost] = []
    alike: dict[object, LayerCost] = {}
    for index in range(model.layers):
        shapes = layer_shapes(model, index)
        own = [f"layers.{index}.{name}" for name in shapes]
        trained = tuple(None if name in work.frozen else work.moments.get(name, 2) for name in own)
        kind = tuple(shapes.items()), trained, work.passes_gradients(index), work.keys(index)
        if kind not in alike:
            alike[kind] = _layer(work, index)
        layers.append(replace(alike[kind], name=f"layer {index}"))
    return CostTable(embedding, layers, head, "FLOPs at 1 TFLOP/s", tied_bytes, output_bytes(work))


def _layer(work: ModelWork, index: int) -> LayerCost:
    attention, feed_forward = layer_held(work, index)
    return joined(
        f"layer {index}",
        _half(work, index, LayerPart.ATTENTION, attention_flops(work.model, index, work.sequence_length), attention),
        _half(work, index, LayerPart.FEED_FORWARD, feed_forward_flops(work.model, index), feed_forward),
    )


def _half(work: ModelWork, index: int, part: LayerPart, flops: Flops, held: Held) -> LayerCost:
    return LayerCost(
        part.value,
        _seconds(work, flops.forward) / work.layout.tensor,
        _seconds(work, flops.input_gradient) / work.layout.tensor,
        _seconds(work, flops.weight_gradient) / work.layout.tensor,
        layer_bytes(work, index, part),
        **asdict(held),
    )


def _seconds(work: ModelWork, flops_per_token: float) -> float:
    return flops_per_token * work.tokens / FLOPS_PER_SECOND


def layer_bytes(work: ModelWork, index: int, part: LayerPart = LayerPart.WHOLE) -> int:
    """Returns the bytes of weights, gradients, optimizer state and buffers of a decoder layer, or of a half of it, on a rank."""
    return layer_state(work, index, part).total()


def end_bytes(work: ModelWork) -> tuple[int, int, int]:
    """Returns three numbers of bytes of state on a rank: of the embedding, of the head with the final norm, and those that both
    include but that exist only once if the same rank holds both (0 unless embeddings are tied)."""
    embedding, head = (state.total() for state in end_state(work))
    shared = parameter_state(work, "embedding.weight", (work.model.padded_vocab, work.model.hidden)).total()
    return embedding, head, shared if work.model.tie_embeddings else 0


def output_bytes(work: ModelWork) -> int:
    """Returns the bytes of a stage's output for a micro-batch."""
    return work.tokens_between * work.model.hidden * work.item_bytes
