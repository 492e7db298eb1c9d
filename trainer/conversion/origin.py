"""Reads a rank's part of the weights from where model.from says, straight from the files."""

import shutil
from pathlib import Path

import torch

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.layout.directory import checkpoint_at
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.parallel.boxes import Box
from bagualu.parallel.parallelize import Fill
from bagualu.trainer.conversion.besides import keep_besides
from bagualu.trainer.models.hugging_face.directory import is_hugging_face, open_model
from bagualu.trainer.models.hugging_face.read import Reader
from bagualu.trainer.recipe.config import Recipe


def values_of(recipe: Recipe) -> Fill | None:
    """Returns the function that reads the weights and buffers with which the run begins, one box after the other; None if the
    recipe names no origin, so that they are drawn. Raises RecipeError, and CheckpointError, here and when a box is read."""
    if recipe.model.origin is None:
        return None
    path = Path(recipe.model.origin)
    if is_hugging_face(path):
        return Reader(open_model(path)).fill
    return StoredWeights(Checkpoint(checkpoint_at(path))).fill


def keep_origin(recipe: Recipe) -> None:
    """Copies configuration and tokenizer of the model that the run begins with, if it came from Hugging Face, to the run's
    directory."""
    assert recipe.model.origin is not None
    path, run = Path(recipe.model.origin), RunDirectory(recipe.run.dir)
    if is_hugging_face(path):
        keep_besides(open_model(path), run)
        return
    before = RunDirectory(checkpoint_at(path).resolve().parent.parent).hugging_face
    if before.is_dir():
        shutil.copytree(before, run.hugging_face, dirs_exist_ok=True)


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
