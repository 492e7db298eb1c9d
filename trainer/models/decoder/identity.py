"""Reads the model back from the identity that a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig

_MODEL = "model."


def model_of(identity: Mapping[str, Any]) -> ModelConfig:
    """Returns the model whose `ModelConfig.identity` is in `identity`, which may have other keys besides. Keys that an earlier
    version did not have get their defaults. Raises RecipeError for keys of the model that this version does not have."""
    own = {key.removeprefix(_MODEL): value for key, value in identity.items() if key.startswith(_MODEL)}
    moe = {key.removeprefix("moe."): own.pop(key) for key in list(own) if key.startswith("moe.")}
    own.pop("vocab_multiple", None)  # in checkpoints of earlier versions, which padded the vocabulary
    unknown = own.keys() - {field.name for field in fields(ModelConfig)} | moe.keys() - {field.name for field in fields(MoEConfig)}
    if not own or unknown:
        raise RecipeError("the checkpoint is of a model that this version does not know "
                          f"({', '.join(sorted(unknown)) or 'no keys'}); use the version that wrote it")  # fmt: skip
    if not moe.get("experts"):
        moe = {}
    return ModelConfig(**own, moe=MoEConfig(**moe))
