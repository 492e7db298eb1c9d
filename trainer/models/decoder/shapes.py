"""The global shapes of the decoder's tensors, known without building it."""

from functools import partial

from bagualu.parallel.pipeline.layer_slice import LayerPart
from bagualu.trainer.models.decoder.config import ModelConfig


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the global shapes of all parameters, without padding, by name. A head that is tied is the embedding."""
    vocabulary = (model.vocab, model.hidden)
    layers = {f"layers.{i}.{name}": shape for i in range(model.layers) for name, shape in layer_shapes(model, i).items()}
    head = {} if model.tie_embeddings else {"head.weight": vocabulary}
    return {**embedding_shapes(model, model.vocab), **layers, **norm_shapes(model, "norm"), **head}


def embedding_shapes(model: ModelConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters of the embedding, whose vocabulary has `rows` rows, and of its norm."""
    norm = norm_shapes(model, "embedding_norm") if model.embedding_norm else {}
    positions = {"embedding.positions.weight": (model.max_positions, model.hidden)} if model.max_positions else {}
    return {"embedding.weight": (rows, model.hidden), **positions, **norm}


def norm_shapes(model: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters of the norm `name` of hidden states."""
    parts = ("weight", "bias") if model.norm == "layer" else ("weight",)
    return {f"{name}.{part}": (model.hidden,) for part in parts}


def layer_shapes(model: ModelConfig, index: int, part: LayerPart = LayerPart.WHOLE) -> dict[str, tuple[int, ...]]:
    """Returns the global shapes of the parameters of a decoder layer, or of a half of it, by name."""
    return {name: shape for name, shape in _layer_shapes(model, index).items() if part.holds(name)}


def _layer_shapes(model: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    with_factors = partial(model.lora.with_factors, f"layers.{index}.")
    hidden, heads, narrow = model.hidden, model.heads * model.head_width, model.key_value_heads * model.head_width
    shapes: dict[str, tuple[int, ...]] = {
        **norm_shapes(model, "attention_norm"),
        **_linear("attention.query", heads, hidden, model.bias != "none"),
        **_linear("attention.key", narrow, hidden, model.bias != "none"),
        **_linear("attention.value", narrow, hidden, model.bias != "none"),
        **_linear("attention.output", hidden, heads, model.bias == "all"),
        **(_query_and_key_norms(model) if model.qk_norm else {}),
        **norm_shapes(model, "feed_forward_norm"),
    }
    if not model.is_moe_layer(index):
        return with_factors(shapes | _feed_forward(model, "feed_forward", model.ffn, model.bias == "all"))
    moe = model.moe
    shapes["feed_forward.router.weight"] = (moe.experts, hidden)
    shapes |= {f"feed_forward.experts.{name}": (moe.experts, moe.ffn, hidden) for name in _inputs(model)}
    shapes["feed_forward.experts.down"] = (moe.experts, hidden, moe.ffn)
    shared = _feed_forward(model, "feed_forward.shared", moe.shared_experts * moe.ffn, False) if moe.shared_experts else {}
    return with_factors(shapes | shared)


def layer_buffers(model: ModelConfig, index: int, part: LayerPart = LayerPart.WHOLE) -> dict[str, tuple[int, ...]]:
    """Returns the global shapes of the buffers of a decoder layer, or of a half of it, by name; {} if it has none."""
    has_bias = model.is_moe_layer(index) and model.moe.has_bias and part is not LayerPart.ATTENTION
    return {"feed_forward.router.bias": (model.moe.experts,)} if has_bias else {}


def _query_and_key_norms(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    heads = (model.heads, model.key_value_heads) if model.qk_norm_over == "all" else (1, 1)
    return {f"attention.{name}_norm.weight": (n * model.head_width,) for name, n in zip(("query", "key"), heads, strict=True)}


def _inputs(model: ModelConfig) -> tuple[str, ...]:
    """Returns the names of the matrices of a feed-forward that read its input."""
    return ("gate", "up") if model.gated else ("up",)


def _feed_forward(model: ModelConfig, name: str, ffn: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes = dict.fromkeys(_inputs(model), (ffn, model.hidden)) | {"down": (model.hidden, ffn)}
    return {key: value for part, shape in shapes.items() for key, value in _linear(f"{name}.{part}", *shape, bias).items()}


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (outputs, inputs)}
    return shapes | ({f"{name}.bias": (outputs,)} if bias else {})
