"""Translates what config.json says of the angles of positions to keys of `model.*` and back, by its old fields (rope_theta and
rope_scaling), which transformers 4 reads, and by the new one (rope_parameters). It does not import torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.hugging_face.families import FULL, SLIDING, ModelFamily

_ORIGINAL = "original_max_position_embeddings"
_OF_TYPES: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {"factor": "rope_factor", "low_freq_factor": "rope_low_frequency_factor",
               "high_freq_factor": "rope_high_frequency_factor", _ORIGINAL: "rope_original_positions"},
    "yarn": {"factor": "rope_factor", _ORIGINAL: "rope_original_positions", "beta_fast": "rope_beta_fast",
             "beta_slow": "rope_beta_slow", "attention_factor": "rope_attention_factor"},
}  # fmt: skip
"""Maps the fields of each rope_type to keys of `model.*`."""
_WITH_DEFAULTS = ("beta_fast", "beta_slow", "attention_factor")
"""Fields that may be left out; the keys have the same defaults."""


def read_rope(
    given: Mapping[str, Any], fields: Mapping[str, Any], keys: Mapping[str, Any], family: ModelFamily, where: str
) -> dict[str, Any]:
    """Returns the keys of rotary positions. `given`: the fields of config.json; `fields`: the same with defaults;
    `keys`: those of the layers' windows. Raises RecipeError for angles that the decoder does not have."""
    theta = {"rope_theta": given.get("rope_theta")}
    old = theta | dict(given.get("rope_scaling") or {})
    spellings = list(_new(given))
    if not spellings or any(value is not None for value in old.values()):
        spellings.append((theta if family.window == "layer_types" else old, old))  # OLMo 3 scales in layers without a window only
    read = [
        _of_layers(_keys(sliding, fields, where), _keys(full, fields, where), keys, family, where) for sliding, full in spellings
    ]
    if any(one != read[0] for one in read):
        raise RecipeError(f"{where} gives the angles of positions more than once, and not the same (rope_theta, rope_scaling, "
                          "rope_parameters); leave the wrong ones out")  # fmt: skip
    return read[0]


def write_rope(model: ModelConfig, family: ModelFamily) -> dict[str, Any]:
    """Returns the fields of config.json for the angles of `model`, by both names."""
    plain: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_type": "default"}
    scaling = None
    if model.rope_scaling != "none":
        values = {name: getattr(model, key) for name, key in _OF_TYPES[model.rope_scaling].items()}
        if model.rope_scaling == "yarn":
            values["attention_factor"] = model.rope_amplitude
        scaling = {"rope_type": model.rope_scaling, **values}
    scaled = plain | (scaling or {})
    by_kind = {SLIDING: dict(plain), FULL: scaled}
    return {"rope_theta": model.rope_theta, "rope_scaling": scaling,
            "rope_parameters": by_kind if family.window == "layer_types" else scaled}  # fmt: skip


def _new(given: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields what rope_parameters says of layers with a window and of layers without: the same or, nested, each its own."""
    parameters = dict(given.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in parameters.values()):
        yield parameters.get(SLIDING) or {}, parameters.get(FULL) or {}
    elif parameters:
        yield parameters, parameters


def _of_layers(
    sliding: dict[str, Any], full: dict[str, Any], keys: Mapping[str, Any], family: ModelFamily, where: str
) -> dict[str, Any]:
    """Returns the keys for all layers, given those for layers with a window and for layers without."""
    if keys["window"] is None:
        return full
    if sliding == full or keys["full_attention_every"] is None:
        return sliding
    if family.window == "layer_types" and sliding == {"rope_theta": full["rope_theta"]}:
        return full | {"rope_scaled_layers": "full"}
    raise RecipeError(f"{where} gives layers with a window other angles of positions than layers without; the decoder has the same "
                      "in all layers, or for olmo3 unscaled ones in those with a window")  # fmt: skip


def _keys(given: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    own = {name: value for name, value in given.items() if value is not None}
    kind = own.get("rope_type") or own.get("type") or "default"
    if kind not in _OF_TYPES or own.get("partial_rotary_factor", 1) != 1:
        raise RecipeError(f"{where} has rope_type={kind}, partial_rotary_factor={own.get('partial_rotary_factor', 1)}; the decoder "
                          f"has rope_type={', '.join(_OF_TYPES)}, over whole heads")  # fmt: skip
    keys: dict[str, Any] = {"rope_theta": float(own.get("rope_theta", fields["rope_theta"]))}
    if kind == "default":
        return keys
    _refuse_unknown(own, kind, where)
    values = {_ORIGINAL: fields.get("max_position_embeddings"), **own}
    if missing := [name for name in _OF_TYPES[kind] if name not in _WITH_DEFAULTS and values.get(name) is None]:
        raise RecipeError(f"{where} has rope_type={kind} without {', '.join(missing)}")
    for name, key in _OF_TYPES[kind].items():
        if name in values:
            keys[key] = int(values[name]) if name == _ORIGINAL else float(values[name])
    keys["rope_scaling"] = kind
    if keys.get("rope_attention_factor") == ModelConfig(rope_scaling=kind, rope_factor=keys["rope_factor"]).rope_amplitude:
        del keys["rope_attention_factor"]  # the default
    return keys


def _refuse_unknown(own: Mapping[str, Any], kind: str, where: str) -> None:
    """Raises RecipeError for fields that change a scaling otherwise."""
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", _ORIGINAL, *_OF_TYPES[kind]}
    unknown = [f"{name}={value}" for name, value in own.items() if name not in known and (name, value) != ("truncate", True)]
    if unknown:
        raise RecipeError(f"{where} has {', '.join(unknown)} for rope_type={kind}, which the decoder does not know; "
                          "remove the field if the model does not depend on it")  # fmt: skip
