"""Translates config.json of Hugging Face to keys of `model.*` and back. It does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.hugging_face.families import DEFAULTS, FAMILIES, FULL, SLIDING, ModelFamily, family_of
from bagualu.trainer.models.hugging_face.rope import read_rope, write_rope

_NAMES = {
    "num_hidden_layers": "layers", "hidden_size": "hidden", "num_attention_heads": "heads", "num_key_value_heads": "kv_heads",
    "vocab_size": "vocab", "tie_word_embeddings": "tie_embeddings", "rms_norm_eps": "norm_epsilon",
    "initializer_range": "initial_std",
}  # fmt: skip
"""Maps fields of config.json to keys of `model.*` with the same values."""
_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size")
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "attention_dropout": (0, None), "pretraining_tp": (1, None), "router_jitter_noise": (0, None),
    "mlp_only_layers": ([], None), "partial_rotary_factor": (1, None), "quantization_config": (None,), "auto_map": (None,),
    "is_encoder_decoder": (False,), "chunk_size_feed_forward": (0,), "use_mrope": (False, None),
}  # fmt: skip
"""Fields whose other values would make another model, or train it otherwise, with the values that are the decoder's."""
OF_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields with the ids of special tokens."""
POSITIONS = "max_position_embeddings"
"""The field with the number of positions that the model knows."""
_WITHOUT_EFFECT = {*OF_TOKENS, POSITIONS} | {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "output_router_logits",
    "router_aux_loss_coef", "_name_or_path", "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id",
    "problem_type", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "experts_implementation",
}  # fmt: skip
"""Fields on which the logits of a model do not depend."""
_READ = {"head_dim", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "sliding_window",
         "use_sliding_window", "max_window_layers", "layer_types", "intermediate_size"}  # fmt: skip


@dataclass(frozen=True)
class Description:
    """What config.json says."""

    family: ModelFamily
    model: ModelConfig
    positions: int | None
    """The number of positions that the model knows, if config.json says it."""


def read_config(config: Mapping[str, Any], where: str) -> Description:
    """Returns the model that the fields `config` describe. `where`: the file, for messages. Raises RecipeError for an architecture
    or a field that the decoder does not have, by name."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise RecipeError(f"{where} is of model_type={config.get('model_type')}, which the decoder is not; there are "
                          f"{', '.join(FAMILIES)}")  # fmt: skip
    if "num_experts" in family.mixture and "num_local_experts" in config:  # the name that transformers 5 writes
        others = {name: value for name, value in config.items() if name != "num_local_experts"}
        config = {"num_experts": config["num_local_experts"], **others}
    named = config.get("architectures") or [family.architecture]
    if named != [family.architecture]:
        raise RecipeError(f"{where} is of architectures={named}; only {family.architecture} has the parameters of a decoder with a "
                          "head for the next token")  # fmt: skip
    _refuse_unknown(config, family, where)
    if missing := [name for name in _REQUIRED if config.get(name) is None]:
        raise RecipeError(f"{where} lacks {', '.join(missing)}; give the whole directory as it was published")
    fields = {**DEFAULTS, **family.defaults, **config}
    try:
        model = ModelConfig(**_keys(fields, config, family, where))
        model.validate()
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RecipeError(f"{where} has a value of a wrong kind ({error}); give the file as it was published") from error
    except RecipeError as error:
        raise RecipeError(f"{where} describes no model that can be trained: {error}") from error
    positions = config.get(POSITIONS)
    if positions is not None and (type(positions) is not int or positions < 1):
        raise RecipeError(
            f"{where} has {POSITIONS}={positions}, which is no number of positions; give the file as it was published"
        )
    return Description(family, model, positions)


def _refuse_unknown(config: Mapping[str, Any], family: ModelFamily, where: str) -> None:
    known = _NAMES.keys() | _ONLY.keys() | _WITHOUT_EFFECT | _READ | family.mixture.keys() | family.defaults.keys()
    if unknown := sorted(config.keys() - known):
        named = ", ".join(f"{name}={config[name]}" for name in unknown)
        raise RecipeError(f"{where} has {named}, which the decoder does not know; "
                          "remove the field if the model does not depend on it")  # fmt: skip
    for name, allowed in _ONLY.items():
        if name in config and config[name] not in allowed:
            raise RecipeError(f"{where} has {name}={config[name]}, but the decoder has only {name}={allowed[0]}")


def _keys(fields: Mapping[str, Any], given: Mapping[str, Any], family: ModelFamily, where: str) -> dict[str, Any]:
    """Returns the keys of `model.*`. `fields`: those of config.json with defaults; `given`: without."""
    keys: dict[str, Any] = {key: fields[name] for name, key in _NAMES.items() if name in fields}
    window, every = _window(fields, given, family, where)
    keys |= {**family.fixed, "bias": _bias(fields, family, where), "window": window, "full_attention_every": every}
    keys |= read_rope(given, fields, keys, family, where)
    width = fields.get("head_dim")
    if width is not None and family.head_dim and width * fields["num_attention_heads"] != fields["hidden_size"]:
        keys["head_dim"] = width
    elif width is not None and not family.head_dim and width * fields["num_attention_heads"] != fields["hidden_size"]:
        raise RecipeError(
            f"{where} has head_dim={width}, but heads of {family.model_type} are hidden_size / num_attention_heads wide"
        )
    if not family.mixture:
        return keys | {"ffn": fields["intermediate_size"]}
    moe = {key: fields[name] for name, key in family.mixture.items() if name in fields}
    if family.model_type == "mixtral":
        moe["renormalise"] = True
    else:
        keys["ffn"] = fields["intermediate_size"]
    return keys | {"moe": MoEConfig(**moe)}


def _bias(fields: Mapping[str, Any], family: ModelFamily, where: str) -> str:
    attention, feed_forward = bool(fields.get("attention_bias")), bool(fields.get("mlp_bias"))
    fixed = str(family.fixed.get("bias", "none"))
    if not attention and not feed_forward:
        return fixed
    if family.model_type == "llama" and attention and feed_forward:
        return "all"
    raise RecipeError(f"{where} has attention_bias={attention} and mlp_bias={feed_forward}; of biases that config.json chooses, "
                      "the decoder has only those of Llama with both")  # fmt: skip


def _window(fields: Mapping[str, Any], given: Mapping[str, Any], family: ModelFamily, where: str) -> tuple[int | None, int | None]:
    """Returns model.window and model.full_attention_every."""
    size, layers = fields.get("sliding_window"), fields["num_hidden_layers"]
    if family.window == "none" or (family.model_type.startswith("qwen") and not fields.get("use_sliding_window")):
        size = None
    kinds = fields.get("layer_types")
    if kinds is None and family.window == "late":
        kinds = [SLIDING if layer >= fields.get("max_window_layers", 28) else FULL for layer in range(layers)]
    elif kinds is None and family.window == "layer_types":
        kinds = [FULL if (layer + 1) % 4 == 0 else SLIDING for layer in range(layers)]
    if size is None:
        if SLIDING in (given.get("layer_types") or ()):
            raise RecipeError(f"{where} has layer_types={given['layer_types']} without a sliding_window in use")
        return None, None
    if kinds is None or set(kinds) == {SLIDING}:
        return size, None
    if set(kinds) == {FULL}:
        return None, None
    every = kinds.index(FULL) + 1 if FULL in kinds else 0
    if kinds != [FULL if every and (layer + 1) % every == 0 else SLIDING for layer in range(layers)]:
        raise RecipeError(f"{where} has a window in layers that model.full_attention_every does not describe: {kinds}")
    return size, every


def write_config(model: ModelConfig, dtype: str, ids: Mapping[str, Any], positions: int) -> dict[str, Any]:
    """Returns the fields of config.json for `model`, with weights of `dtype`, by the names that transformers 5 reads and by those
    of 4.57. `ids`: those of OF_TOKENS that are known. `positions`: the number of positions that the model knows. Raises RecipeError
    for a model that no family of transformers describes."""
    family = family_of(model)
    if family is None:
        raise RecipeError(f"no architecture of transformers that is known here ({', '.join(FAMILIES)}) describes this model: "
                          f"{_unusual(model)}")  # fmt: skip
    fields: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    fields |= {name: getattr(model, key) for name, key in _NAMES.items()}
    fields |= {"num_key_value_heads": model.key_value_heads, "hidden_act": "silu", "use_cache": True, "attention_dropout": 0.0}
    fields |= {"intermediate_size": model.ffn, "dtype": dtype, "torch_dtype": dtype}
    fields |= {POSITIONS: positions, **dict.fromkeys(OF_TOKENS), **ids}
    if family.head_dim:
        fields["head_dim"] = model.head_width
    if family.model_type == "llama":
        fields |= {"attention_bias": model.bias == "all", "mlp_bias": model.bias == "all"}
    fields |= {name: getattr(model.moe, key) for name, key in family.mixture.items()}
    if "norm_topk_prob" in family.mixture:
        fields |= {"norm_topk_prob": model.moe.renormalises, "mlp_only_layers": [], "num_local_experts": model.moe.experts}
    return fields | _window_fields(model, family) | write_rope(model, family)


def _window_fields(model: ModelConfig, family: ModelFamily) -> dict[str, Any]:
    if family.window == "none":
        return {}
    windows = [model.window_of(layer) for layer in range(model.layers)]
    fields: dict[str, Any] = {"sliding_window": model.window}
    if family.model_type.startswith("qwen"):
        fields["use_sliding_window"] = model.window is not None
    if family.window in ("late", "layer_types"):
        fields["layer_types"] = [FULL if window is None else SLIDING for window in windows]
    if family.window == "late":
        fields["max_window_layers"] = model.layers if model.window is None else 0
    return fields


def _unusual(model: ModelConfig) -> str:
    plain = ModelConfig()
    names = ("norm", "norm_position", "activation", "positions", "bias", "embedding_norm", "qk_norm", "qk_norm_over", "window",
             "full_attention_every", "head_dim", "rope_scaling", "rope_scaled_layers")  # fmt: skip
    values = [f"model.{name}={getattr(model, name)}" for name in names if getattr(model, name) != getattr(plain, name)]
    if model.moe.experts:
        values += [f"model.moe.{name}={getattr(model.moe, name)}"
                   for name in ("experts", "shared_experts", "every", "bias_rate", "renormalise")]  # fmt: skip
    return " ".join(values)
