"""Builds this rank's part of the model, before an engine takes hold of its parameters."""

from collections.abc import Callable

import torch
from torch import nn

from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.boxes import Box
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.parallelize import Fill, parallelize
from bagualu.parallel.precision import chip_of
from bagualu.parallel.sharding import ShardingPlan
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.models.decoder.plan import decoder_plan
from bagualu.trainer.operators.operator_set import OperatorSet, operator_set
from bagualu.trainer.recipe.config import Recipe

Take = Callable[[Decoder, ShardingPlan, list[tuple[str, nn.Parameter]]], None]
"""Called with the model, its plan, and some of its parameters with their names on this rank."""


def no_values(name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
    """Returns zeros of the shape of `box`, for values that are read from a checkpoint or received from another rank afterwards."""
    return torch.zeros(box.shape)


def operators_of(recipe: Recipe, device: torch.device) -> OperatorSet:
    """Returns the variants by which ranks on `device` compute. Raises RecipeError if `operators` names one that the chip
    has not."""
    return operator_set(recipe.variants, chip_of(device), here=device.type != "meta")


def local_model(
    recipe: Recipe, mesh: Mesh, split: Split, fill: Fill, dtype: torch.dtype, take: Take = lambda model, plan, parameters: None
) -> tuple[Decoder, ShardingPlan]:
    """Returns this rank's stages of `split`, with weights of `dtype` and buffers from `fill`, and the plan by which they are
    sharded. Frozen parameters have requires_grad=False. Raises RecipeError if `operators` names a variant that the chip has not.

    `take` is called for each of the model's `units` as soon as its parameters exist, with those that no unit before it has; it may
    free what this rank need not hold.
    """
    config, parallel = recipe.model.padded_over(mesh.layout.tensor), recipe.parallel
    slices = [split.slices[stage] for stage in mesh.stages]
    plan = decoder_plan(config, parallel.sequence)
    device = mesh.group("world").device
    operators = operators_of(recipe, device)
    with torch.device("meta"):
        model = Decoder(config, slices, mesh.first_stage, mesh.last_stage, split.recompute, recipe.train.offload_bytes, operators)
    taken: set[int] = set()

    def filled(unit: nn.Module) -> None:
        own = {id(parameter) for parameter in unit.parameters()} - taken
        parameters = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in own]
        for name, parameter in parameters:
            parameter.requires_grad_(not recipe.freezes(plan.global_name(name)))
        taken.update(own)
        take(model, plan, parameters)

    parallelize(model, plan, mesh, parallel.sequence, dtype, fill, model.units, filled)
    return model, plan
