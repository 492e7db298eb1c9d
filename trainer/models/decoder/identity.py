"""Reads the model back from the identity that a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.lora import LoraConfig

_MODEL, _MOE, _LORA = "model.", "moe.", "lora."


def model_of(identity: Mapping[str, Any]) -> ModelConfig:
    """Returns the model whose `ModelConfig.identity` is in `identity`, which may have other keys besides. Keys that an earlier
    version did not have get their defaults. Raises RecipeError for keys of the model that this version does not have."""
    values = _inside(identity, _MODEL)
    moe, lora = _inside(values, _MOE), _inside(values, _LORA)
    own = {key: value for key, value in values.items() if not key.startswith((_MOE, _LORA))}
    own.pop("vocab_multiple", None)  # in checkpoints of earlier versions, which padded the vocabulary
    sections: list[tuple[dict[str, Any], type[Any]]] = [(own, ModelConfig), (moe, MoEConfig), (lora, LoraConfig)]
    unknown = {key for given, section in sections for key in given.keys() - {field.name for field in fields(section)}}
    if not own or unknown:
        raise RecipeError("the checkpoint is of a model that this version does not know "
                          f"({', '.join(sorted(unknown)) or 'no keys'}); use the version that wrote it")  # fmt: skip
    if not moe.get("experts"):
        moe = {}
    return ModelConfig(**own, moe=MoEConfig(**moe), lora=LoraConfig(**lora))


def lora_of(identity: object) -> LoraConfig:
    """Returns the factors that the model of `identity` has; none if that is no identity."""
    return LoraConfig(**_inside(identity, _MODEL + _LORA)) if isinstance(identity, dict) else LoraConfig()


def _inside(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the values whose keys begin with `prefix`, by the rest of the key."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
