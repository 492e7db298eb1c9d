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
from bagualu.trainer.models.hugging_face.directory import is_hugging_face, open_model
from bagualu.trainer.models.hugging_face.fingerprint import fingerprint
from bagualu.trainer.models.hugging_face.read import Reader
from bagualu.trainer.recipe.config import Recipe


def values_of(recipe: Recipe, communicator: Communicator) -> Fill | None:
    """Returns the function that reads the weights and buffers with which the run begins, one box after the other; None if the
    recipe names no origin, so that they are drawn. Collective. Raises RecipeError on every rank also if model.from names other
    weights on another node; and RecipeError and CheckpointError here and when a box is read."""
    if recipe.model.origin is None:
        return None
    fill, known = on_all(partial(_open, Path(recipe.model.origin)), communicator.world)
    if difference := first_different(known, communicator.world):
        raise RecipeError(f"model.from={recipe.model.origin} holds another model on the node of rank {difference[0]} than on that "
                          "of rank 0; give every node the same files")  # fmt: skip
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


class StoredWeights:
    """The weights and buffers in a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def fill(self, name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        """Returns the elements `box` of the parameter or buffer `name` of `shape`, as they are stored."""
        for stored in (f"weight/{name}", f"buffer/{name}"):
            if stored in self._checkpoint.tensors:
                values = torch.empty(box.shape, dtype=self._checkpoint.tensors[stored][1])
                self._checkpoint.read(stored, box.offset, values)
                return values
        raise RecipeError(f"{self._checkpoint.path} has no tensor {name}, which its model needs; give a checkpoint that is whole")
