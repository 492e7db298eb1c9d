"""A model that continues sequences, split over the ranks of any layout.

Shapes: B sequences, S tokens of a pass, V vocabulary, H hidden.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from bagualu.comm.differentiable import gather_from
from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.agree import on_all
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.pipeline.relay import relay
from bagualu.parallel.pipeline.runtime import Slices
from bagualu.parallel.pipeline.split import split_layers
from bagualu.parallel.precision import chip_of
from bagualu.trainer.conversion.stored_weights import StoredWeights
from bagualu.trainer.engine.local_model import local_model
from bagualu.trainer.models.decoder.cache import Columns
from bagualu.trainer.models.decoder.frozen import freeze
from bagualu.trainer.operators.choice import as_recorded
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.operator_set import lacked_by
from bagualu.trainer.operators.registry import AUTO
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.override_text import typed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stages:
    """This rank's stages. `run` computes one of them, as the pipeline's `Slices` do; `model` holds its modules."""

    recipe: Recipe
    mesh: Mesh
    model: nn.Module
    run: Slices

    def freeze(self) -> None:
        """Makes `logits` quick; then the model gives nothing else."""
        freeze(self.model)

    def logits(self, tokens: torch.Tensor, columns: Columns) -> torch.Tensor | None:
        """Continues each sequence by tokens [B, S]. Returns the logits after the last of them [B, L, V], of as many as `cached` was
        told, on the ranks of the last stage, None on the others. Collective over tensor, pipeline and expert ranks."""
        tensor, model = self.mesh.group("tensor"), self.recipe.model
        added = tokens.shape[1]
        ranks = tensor.size if self.recipe.parallel.sequence else 1
        width = -(-added // ranks) * ranks
        if width > added:
            tokens = torch.cat((tokens.new_zeros(len(tokens), width - added), tokens), 1)
        shape = (len(tokens), width // ranks, model.hidden)
        with columns.adding(added, width):
            logits = relay(self.mesh, self._stage, tokens, shape, getattr(torch, self.recipe.train.stored_dtype))
        return None if logits is None else gather_from(logits, tensor, 2)[..., : model.vocab]

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor, *documents: torch.Tensor) -> torch.Tensor | None:
        """Returns the loss, summed over the labels [B, S] of tokens [B, S], on the ranks of the last stage, None on the others.
        `documents` as in MicroBatch, if rows hold several. Collective over tensor, pipeline and expert ranks."""
        last = len(self.mesh.stages) - 1 if self.mesh.last_stage else None
        ranks = self.mesh.group("tensor").size if self.recipe.parallel.sequence else 1
        shape = (len(tokens), tokens.shape[1] // ranks, self.recipe.model.hidden)

        def run(x: torch.Tensor, chunk: int) -> torch.Tensor:
            return self.run(x, labels if chunk == last else None, chunk, *documents)[0]

        return relay(self.mesh, run, tokens, shape, getattr(torch, self.recipe.train.stored_dtype))

    def _stage(self, x: torch.Tensor, chunk: int) -> torch.Tensor:
        return self.run(x, None, chunk)[0]


def load_stages(recipe: Recipe, communicator: Communicator, path: Path) -> Stages:
    """Returns this rank's stages with the weights of the checkpoint at `path`, of which it reads no others. Where operators.NAME is
    auto, they compute as the run did. Collective. Raises RecipeError if the checkpoint is of another model, CheckpointError if it
    is damaged."""
    layout = recipe.validate(communicator.size)
    mesh = Mesh.build(layout, communicator, StagePlacement(layout.pipeline))
    split = Split(split_layers(recipe.model.layers, mesh.placement), ["none"] * recipe.model.layers)

    def load() -> nn.Module:
        checkpoint = Checkpoint(path)
        plain = recipe.without_float8()  # generation never multiplies in float8
        as_trained = replace(plain, operators=_as_trained(plain, path, chip_of(communicator.device)))
        _require_model(recipe, checkpoint)
        return local_model(as_trained, mesh, split, StoredWeights(checkpoint).fill, getattr(torch, recipe.train.stored_dtype))[0]

    model = on_all(load, communicator.world)
    return Stages(recipe, mesh, model, model)


def _as_trained(recipe: Recipe, path: Path, chip: str) -> OperatorsConfig:
    """Returns the operators of `recipe` with the variants of the run whose checkpoint `path` is in place of auto, as far as `chip`
    and this machine have them. Nothing is updated."""
    config = recipe.operators
    record = RunDirectory(path.resolve().parents[1]).operators
    try:
        found = as_recorded(record, config, chip, recipe.train.dtype)
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); operators are computed by the usual variants", record, error)
        return config
    found = replace(found, update=AUTO)
    return replace(found, **dict.fromkeys(lacked_by(found, config, chip), AUTO))


def _require_model(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Raises RecipeError unless the recipe's model is the one that the checkpoint was saved with."""
    saved = checkpoint.metadata.get("identity")
    if not isinstance(saved, dict):
        return
    for key, here in recipe.model.identity().items():
        merged = key.startswith("model.lora.")  # `StoredWeights` takes factors from the checkpoint alone
        if key in saved and not merged and not recipe.model.fits(key, saved[key], here):
            raise RecipeError(f"{checkpoint.path} was saved with {key}={typed(saved[key])} but config.yaml of its run has "
                              f"{typed(here)}; put that file back as it was")  # fmt: skip
