"""The families of models whose Hugging Face configuration the decoder has keys for, and what distinguishes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bagualu.trainer.models.decoder.config import ModelConfig


@dataclass(frozen=True)
class ModelFamily:
    """A family of models: its name in config.json, and the values that its models share."""

    model_type: str
    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The values that transformers takes for fields that config.json may leave out, where they differ from `DEFAULTS`."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """The values of keys of `model.*` that all models of the family have."""
    window: str = "none"
    """Which layers may have a window: none | all | layer_types, those that the field of this name lists | late, those from
    max_window_layers on, or as layer_types says."""
    head_dim: bool = True
    """Whether config.json may give the width of a head."""
    mixture: Mapping[str, str] = field(default_factory=dict)
    """Maps fields of config.json to keys of `model.moe.*`; empty for a dense family."""


DEFAULTS: dict[str, Any] = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "initializer_range": 0.02}
"""The values that transformers takes for fields that config.json leaves out."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""The kinds of layers that the field layer_types lists."""
_OLMO = {"norm_position": "after", "qk_norm": True, "qk_norm_over": "all"}
_FAMILIES = (
    ModelFamily("llama", "LlamaForCausalLM"),
    ModelFamily("mistral", "MistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096}, window="all"),
    ModelFamily("qwen2", "Qwen2ForCausalLM", {"num_key_value_heads": 32}, {"bias": "attention"}, "late", head_dim=False),
    ModelFamily("qwen3", "Qwen3ForCausalLM", {"num_key_value_heads": 32, "head_dim": 128}, {"qk_norm": True}, "late"),
    ModelFamily("olmo2", "Olmo2ForCausalLM", {"rms_norm_eps": 1e-5}, _OLMO, head_dim=False),
    ModelFamily("olmo3", "Olmo3ForCausalLM", {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096}, _OLMO,
           "layer_types", head_dim=False),
    ModelFamily("mixtral", "MixtralForCausalLM", {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}, window="all",
           mixture={"num_local_experts": "experts", "num_experts_per_tok": "top_k", "intermediate_size": "ffn"}),
    ModelFamily("qwen3_moe", "Qwen3MoeForCausalLM", {"num_key_value_heads": 4, "decoder_sparse_step": 1, "norm_topk_prob": False},
           {"qk_norm": True}, "all",
           mixture={"num_experts": "experts", "num_experts_per_tok": "top_k", "moe_intermediate_size": "ffn",
                    "decoder_sparse_step": "every", "norm_topk_prob": "renormalise"}),
)  # fmt: skip
FAMILIES = {family.model_type: family for family in _FAMILIES}
"""The families by their model_type."""


def family_of(model: ModelConfig) -> ModelFamily | None:
    """Returns the family whose configuration can describe `model`; None if there is none. Llama's is preferred to Mistral's, which
    differs by its window only, and OLMo 2's to OLMo 3's."""
    unusual = (model.norm, model.activation, model.positions) != ("rms", "swiglu", "rotary") or model.embedding_norm
    if unusual or model.moe.shared_experts or model.moe.has_bias:
        return None
    return next((family for family in _FAMILIES if _describes(family, model)), None)


def _describes(family: ModelFamily, model: ModelConfig) -> bool:
    free = ("bias",) if family.model_type == "llama" and model.bias == "all" else ()  # attention_bias and mlp_bias
    shared = {"bias": "none", "qk_norm": False, "qk_norm_over": "head", "norm_position": "before"} | dict(family.fixed)
    if any(getattr(model, key) != value for key, value in shared.items() if key not in free):
        return False
    if not family.head_dim and model.head_width * model.heads != model.hidden:
        return False
    if model.window is not None and family.window == "none":
        return False
    if model.full_attention_every is not None and family.window not in ("layer_types", "late"):
        return False
    scaled = model.rope_scaling != "none" and model.window is not None
    if scaled and (family.window == "layer_types") != (model.rope_scaled_layers == "full"):
        return False
    if bool(model.moe.experts) != bool(family.mixture):
        return False
    moe = model.moe
    return family.model_type != "mixtral" or (moe.every == 1 and moe.renormalises)
