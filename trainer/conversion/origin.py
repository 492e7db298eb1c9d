"""Reads a rank's part of the weights from where model.from says, straight from the files."""

import shutil
from functools import partial
from pathlib import Path

import torch

from bagualu.comm.agree import first_different
from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.agree import on_all
from bagualu.fault_tolerance.checkpoint.layout.directory import checkpoint_at
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.parallel.boxes import Box
from bagualu.parallel.parallelize import Fill
from bagualu.trainer.conversion.besides import keep_besides
from bagualu.trainer.conversion.stored_weights import StoredWeights
from bagualu.trainer.models.decoder.initialise import seeded_values
from bagualu.trainer.models.hugging_face.directory import is_hugging_face, open_model
from bagualu.trainer.models.hugging_face.fingerprint import fingerprint
from bagualu.trainer.models.hugging_face.read import Reader
from bagualu.trainer.recipe.config import Recipe


def values_of(recipe: Recipe, communicator: Communicator) -> Fill | None:
    """Returns the function that reads the weights and buffers with which the run begins, one box after the other, and draws the
    factors of model.lora; None if the recipe names no origin, so that all are drawn. Collective. Raises RecipeError on every rank
    also if model.from names other weights on another node; and RecipeError and CheckpointError here and when a box is read."""
    model = recipe.model
    if model.origin is None:
        return None
    stored, known = on_all(partial(_open, Path(model.origin)), communicator.world)
    if difference := first_different(known, communicator.world):
        raise RecipeError(f"model.from={model.origin} holds another model on the node of rank {difference[0]} than on that "
                          "of rank 0; give every node the same files")  # fmt: skip
    if model.lora.rank is None:
        return stored
    drawn = seeded_values(model, recipe.run.seed)

    def fill(name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        return (drawn if model.lora.trains(name) else stored)(name, shape, box)

    return fill


def _open(path: Path) -> tuple[Fill, str]:
    """Returns the function that reads the weights at `path`, and a hash that tells these weights from others."""
    if is_hugging_face(path):
        model = open_model(path)
        return Reader(model).fill, fingerprint(model)
    checkpoint = Checkpoint(checkpoint_at(path))
    return StoredWeights(checkpoint).fill, checkpoint.digest


def keep_origin(recipe: Recipe) -> None:
    """Copies configuration and tokenizer of the model that the run begins with, if it came from Hugging Face, to the run's
    directory. Raises RecipeError."""
    assert recipe.model.origin is not None
    path, run = Path(recipe.model.origin), RunDirectory(recipe.run.dir)
    try:
        if is_hugging_face(path):
            keep_besides(open_model(path), run)
            return
        before = RunDirectory(checkpoint_at(path).resolve().parent.parent).hugging_face
        if before.is_dir():
            shutil.copytree(before, run.hugging_face, dirs_exist_ok=True)
    except OSError as error:
        why = error.strerror or str(error)
        raise RecipeError(f"configuration and tokenizer of model.from={path} cannot be copied to {run.hugging_face} ({why}); make "
                          "room there, or give another run.dir") from error  # fmt: skip
