"""The layers that a rank holds, with everything that is as long as they are: weights, gradient buckets, optimizer.

Made at the start of a run, and again when layers move to other ranks while it goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.boxes import Box
from bagualu.parallel.data import Bucket, GradientReducer, build_buckets
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.parallelize import Fill, parallelize
from bagualu.trainer.models.decoder.initialise import decoder_values
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.models.decoder.plan import decoder_plan
from bagualu.trainer.optim.adamw import ShardedAdamW
from bagualu.trainer.recipe.config import Recipe


@dataclass(frozen=True)
class Stages:
    """What one rank holds of the model, and the state that belongs to it."""

    model: Decoder
    buckets: list[Bucket]
    reducer: GradientReducer
    optimizer: ShardedAdamW


def initial_values(recipe: Recipe) -> Fill:
    """The weights that a run begins with."""
    return partial(decoder_values, recipe.run.seed, recipe.model.initial_std, recipe.model.layers)


def no_values(name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
    """For weights that come from elsewhere."""
    return torch.zeros(box.shape)


def hold(recipe: Recipe, mesh: Mesh, split: Split, fill: Fill) -> Stages:
    """This rank's stages of `split`."""
    config, parallel = recipe.model.padded_over(mesh.layout.tensor), recipe.parallel
    slices = [split.slices[stage] for stage in mesh.stages]
    recompute = [split.recompute[stage] for stage in mesh.stages]
    plan = decoder_plan(config, parallel.sequence)
    with torch.device("meta"):
        model = Decoder(config, slices, mesh.first_stage, mesh.last_stage, recompute)
    parallelize(model, plan, mesh, parallel.sequence, getattr(torch, recipe.train.dtype), fill)
    if recipe.train.compile:
        for layer in model.layers.values():
            layer.compile()
    buckets = build_buckets(model, plan, mesh, parallel.zero, parallel.bucket_bytes, model.uses)
    reducer = GradientReducer(buckets, mesh, fused=_sinks(recipe))
    return Stages(model, buckets, reducer, ShardedAdamW(buckets, recipe.optim))


def _sinks(recipe: Recipe) -> Callable[[str], bool]:
    """Which parameters' gradients go straight into their bucket. Inside a compiled layer they must go to autograd."""
    return lambda name: not (recipe.train.compile and name.startswith("layers."))
