"""Takes the keys of the model from where its weights come (model.from). It does not import torch."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.layout.directory import checkpoint_at
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError
from bagualu.fault_tolerance.checkpoint.layout.manifest import read_manifest
from bagualu.fault_tolerance.run_directory import TOKENIZER, RunDirectory
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.identity import model_of
from bagualu.trainer.models.hugging_face.directory import is_hugging_face, open_model
from bagualu.trainer.recipe.override_text import typed

_OF_TRAINING = ("vocab_multiple", "initial_std", "moe.balance_loss", "lora.rank", "lora.alpha", "lora.targets")
"""Keys of `model.*` that do not belong to the weights, so that a recipe may give others."""


def model_at(path: Path) -> ModelConfig:
    """Returns the model whose weights are at `path`: a directory of Hugging Face, a run or a checkpoint. Raises RecipeError."""
    if is_hugging_face(path):
        return open_model(path).description.model
    try:
        checkpoint = checkpoint_at(path)
    except RecipeError as error:
        raise RecipeError(f"{error}, or a model of Hugging Face") from error
    try:
        return model_of(read_manifest(checkpoint).metadata.get("identity") or {})
    except CheckpointError as error:
        raise RecipeError(str(error)) from error


def tokenizer_of(origin: Path) -> str | None:
    """Returns the tokenizer of the model at `origin`, for data.tokenizer; None if it has none. Raises RecipeError."""
    if is_hugging_face(origin):
        return tokenizer_in(origin)
    run = RunDirectory(checkpoint_at(origin).resolve().parent.parent)
    return tokenizer_in(run.tokenizer.parent) or tokenizer_in(run.hugging_face)


def kept_tokenizer(run: RunDirectory, given: str | None) -> str | None:
    """Returns data.tokenizer for a run that goes on, whose recipe has `given`: its own copy if it has trained with it, or if there
    is nothing at `given` any more. So a run needs no file of the model that it began with."""
    if given is None:
        return None
    own = tokenizer_in(run.tokenizer.parent)
    if own is not None and _has_begun(run):
        return own
    return given if Path(given).exists() else own or tokenizer_in(run.hugging_face) or given


def _has_begun(run: RunDirectory) -> bool:
    try:
        return run.has_begun()
    except OSError:
        return False


def tokenizer_in(folder: Path) -> str | None:
    """Returns `folder` if it holds a tokenizer.json."""
    return str(folder) if (folder / TOKENIZER).is_file() else None


def with_origin(model: ModelConfig, given: Collection[str]) -> ModelConfig:
    """Returns `model` with the keys of the model whose weights model.from names. Factors of that model are part of its weights;
    those that `model` asks for are new. Raises RecipeError if one of the keys `given`, those that the user typed, contradicts
    them."""
    assert model.origin is not None
    if not model.origin.strip():
        raise RecipeError("model.from is missing; give the model to begin with, a directory of Hugging Face, a run or a "
                          "checkpoint, e.g. model.from=runs/tiny")  # fmt: skip
    found = model_at(Path(model.origin))
    for key in sorted(given):
        name = key.removeprefix("model.")
        if key == name or name in (*_OF_TRAINING, "from"):
            continue
        here, there = _value(model, name), _value(found, name)
        if not ModelConfig.fits(key, there, here):
            raise RecipeError(f"{key}={typed(here)} contradicts model.from={model.origin}, whose model has {key}={typed(there)}; "
                              f"leave {key} out")  # fmt: skip
    moe = found.moe
    if moe.experts:
        moe = replace(moe, balance_loss=model.moe.balance_loss)
    elif "model.moe.balance_loss" in given:
        raise RecipeError(f"model.moe.balance_loss={typed(model.moe.balance_loss)} has no effect on the model of model.from="
                          f"{model.origin}, which has no experts; leave it out")  # fmt: skip
    if "model.moe.bias_rate" in given:
        moe = replace(moe, bias_rate=model.moe.bias_rate)
    kept = {name: getattr(model, name) for name in ("origin", "vocab_multiple", "initial_std", "lora")}
    return replace(found, moe=moe, **kept)


def _value(model: ModelConfig, name: str) -> Any:
    """Returns the value of the key `name`, without model. before it, as it takes effect."""
    effective = {"head_dim": "head_width", "kv_heads": "key_value_heads", "moe.renormalise": "moe.renormalises"}
    value: Any = model
    for part in effective.get(name, name).split("."):
        value = getattr(value, part)
    return value
