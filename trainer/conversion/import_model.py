"""Writes a model of Hugging Face as a run that has done no step. One process, which holds a small part of one tensor at a time."""

import shutil
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.layout.shard import LazyPiece
from bagualu.fault_tolerance.checkpoint.saving.alone import save_alone
from bagualu.fault_tolerance.guard.history import Memory
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.parallel.boxes import Box
from bagualu.parallel.precision import accurate_dtype
from bagualu.trainer.conversion.besides import keep_besides
from bagualu.trainer.conversion.portions import portions
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.models.hugging_face.directory import HuggingFaceModel, open_model
from bagualu.trainer.models.hugging_face.read import Reader
from bagualu.trainer.optim.scaler import LossScaler
from bagualu.trainer.recipe.compose import save_recipe
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.origin import tokenizer_in


def import_model(source: Path, to: Path) -> dict[str, Any]:
    """Imports the model in the directory `source` as the run `to`, which must be empty or missing: checkpoint 0 with the weights in
    at least float32 and no moments, config.yaml with the keys of the model, its tokenizer and sequences as long as its positions,
    and copies of its configuration and tokenizer. Returns the path, the number of parameters and the bytes of the weights.

    Raises RecipeError for a model that the decoder cannot be, and CheckpointError if the run cannot be written.
    """
    run = RunDirectory(to)
    if to.exists() and not to.is_dir():
        raise RecipeError(f"{to} is no directory; give one that is empty or missing")
    if to.exists() and any(to.iterdir()):
        raise RecipeError(f"{to} is not empty; give another directory, or remove it first")
    model = open_model(source)
    recipe = Recipe()
    recipe.model, recipe.train.dtype = model.description.model, model.dtype
    recipe.run.dir, recipe.run.name = str(to), to.resolve().name
    try:
        keep_besides(model, run)
        recipe.data.tokenizer = tokenizer_in(run.hugging_face)
        recipe.data.sequence_length = model.description.positions or recipe.data.sequence_length
        save_recipe(recipe)
        path = save_alone(run.checkpoints, 0, _pieces(model), metadata_of(recipe, source))
    except BaseException:
        shutil.rmtree(to, ignore_errors=True)  # it was empty before
        raise
    shapes = parameter_shapes(recipe.model)
    return {"path": str(path), "parameters": sum(map(prod, shapes.values())), "bytes": model.bytes}


def metadata_of(recipe: Recipe, source: Path) -> dict[str, Any]:
    """Returns what the checkpoint of an imported model holds besides tensors. Its identity consists of the keys of the model only:
    no data have been trained on."""
    return {
        "step": 0,
        "updates": 0,
        "scaler": {"scale": LossScaler.for_dtype(recipe.train.dtype).scale, "good_steps": 0},
        "guard": Memory.empty(recipe.guard).as_json(),
        "layout": dict.fromkeys(("data", "tensor", "pipeline", "expert", "context"), 1),
        "engine": recipe.parallel.engine,
        "zero": recipe.parallel.zero_stage,
        "dtype": recipe.train.dtype,
        "identity": recipe.model.identity(),
        "imported": str(source),
    }


def _pieces(model: HuggingFaceModel) -> Iterator[LazyPiece]:
    reader, dtype = Reader(model), accurate_dtype(getattr(torch, model.dtype))
    for name, shape in parameter_shapes(model.description.model).items():
        for box in portions(shape):
            make = partial(_read, reader, name, box, dtype)
            yield LazyPiece(f"weight/{name}", shape, box, str(dtype).removeprefix("torch."), make)


def _read(reader: Reader, name: str, box: Box, dtype: torch.dtype) -> torch.Tensor:
    values = torch.empty(box.shape, dtype=dtype)
    reader.read(name, box, values)
    return values
