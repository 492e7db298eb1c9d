"""The global shapes of the decoder's tensors, known without building it."""

from bagualu.trainer.models.decoder.config import ModelConfig


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the global shapes of all parameters, without padding, by name. A head that is tied is the embedding."""
    vocabulary = (model.vocab, model.hidden)
    layers = {f"layers.{i}.{name}": shape for i in range(model.layers) for name, shape in layer_shapes(model, i).items()}
    head = {} if model.tie_embeddings else {"head.weight": vocabulary}
    return {"embedding.weight": vocabulary, **layers, "norm.weight": (model.hidden,), **head}


def layer_shapes(model: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Returns the global shapes of a decoder layer's parameters, by name."""
    hidden, heads, narrow = model.hidden, model.heads * model.head_dim, model.key_value_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm.weight": (hidden,),
        "attention.query.weight": (heads, hidden),
        "attention.key.weight": (narrow, hidden),
        "attention.value.weight": (narrow, hidden),
        "attention.output.weight": (hidden, heads),
        "feed_forward_norm.weight": (hidden,),
    }
    if not model.is_moe_layer(index):
        return shapes | _swiglu("feed_forward", hidden, model.ffn)
    moe = model.moe
    shapes["feed_forward.router.weight"] = (moe.experts, hidden)
    shapes |= {f"feed_forward.experts.{name}": (moe.experts, moe.ffn, hidden) for name in ("gate", "up")}
    shapes["feed_forward.experts.down"] = (moe.experts, hidden, moe.ffn)
    return shapes | (_swiglu("feed_forward.shared", hidden, moe.shared_experts * moe.ffn) if moe.shared_experts else {})


def layer_buffers(model: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Returns the global shapes of a decoder layer's buffers, by name; {} if it has none."""
    return {"feed_forward.router.bias": (model.moe.experts,)} if model.is_moe_layer(index) and model.moe.has_bias else {}


def _swiglu(name: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.gate.weight": (ffn, hidden), f"{name}.up.weight": (ffn, hidden), f"{name}.down.weight": (hidden, ffn)}
