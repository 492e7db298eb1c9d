"""Builds this rank's part of the model, before an engine takes hold of its parameters."""

from functools import partial

import torch

from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.boxes import Box
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.parallelize import Fill, parallelize
from bagualu.parallel.sharding import ShardingPlan
from bagualu.trainer.models.decoder.initialise import initial_values
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.models.decoder.plan import decoder_plan
from bagualu.trainer.recipe.config import Recipe


def seeded_values(recipe: Recipe) -> Fill:
    """Returns the function that makes a new run's weights and buffers, with weights drawn from run.seed."""
    plan = decoder_plan(recipe.model, recipe.parallel.sequence)
    return partial(initial_values, plan, recipe.run.seed, recipe.model.initial_std, recipe.model.layers)


def no_values(name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
    """Returns zeros of the shape of `box`, for values that are read from a checkpoint or received from another rank afterwards."""
    return torch.zeros(box.shape)


def local_model(recipe: Recipe, mesh: Mesh, split: Split, fill: Fill, dtype: torch.dtype) -> tuple[Decoder, ShardingPlan]:
    """Returns this rank's stages of `split`, with weights of `dtype` and buffers from `fill`, and the plan by which they are
    sharded. Frozen parameters have requires_grad=False."""
    config, parallel = recipe.model.padded_over(mesh.layout.tensor), recipe.parallel
    slices = [split.slices[stage] for stage in mesh.stages]
    recompute = [split.recompute[stage] for stage in mesh.stages]
    plan = decoder_plan(config, parallel.sequence)
    with torch.device("meta"):
        model = Decoder(config, slices, mesh.first_stage, mesh.last_stage, recompute)
    parallelize(model, plan, mesh, parallel.sequence, dtype, fill)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not recipe.optim.freezes(plan.global_name(name)))
    if recipe.train.compile:
        for layer in model.layers.values():
            layer.compile()
    return model, plan
