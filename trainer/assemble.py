"""From a recipe to the parts of a run on one rank, in the order in which they are put on."""

from dataclasses import dataclass
from functools import partial

import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.guard.guard import Guard
from bagualu.parallel.apply import parallelize
from bagualu.parallel.data import Bucket, GradientReducer, build_buckets
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.pipeline.check import check
from bagualu.parallel.pipeline.runtime import PipelineRunner
from bagualu.parallel.pipeline.schedule import Action, compute_schedule, with_messages
from bagualu.parallel.pipeline.split import split_layers
from bagualu.parallel.sharding import ShardingPlan
from bagualu.trainer.config import Recipe
from bagualu.trainer.data.batches import Batches
from bagualu.trainer.data.corpus import Corpus
from bagualu.trainer.initialise import decoder_values
from bagualu.trainer.models.decoder import Decoder
from bagualu.trainer.optim.adamw import ShardedAdamW
from bagualu.trainer.optim.scaler import LossScaler
from bagualu.trainer.plans.decoder import decoder_plan


@dataclass
class Parts:
    """What a step works with."""

    recipe: Recipe
    mesh: Mesh
    model: Decoder
    corpus: Corpus
    batches: Batches
    runner: PipelineRunner
    actions: list[Action]
    """What this stage does in a step."""
    buckets: list[Bucket]
    reducer: GradientReducer
    optimizer: ShardedAdamW
    scaler: LossScaler
    guard: Guard
    device: torch.device
    updates: int = 0
    """Optimizer updates so far: the steps whose gradients were finite."""


def assemble(recipe: Recipe, communicator: Communicator, corpus: Corpus) -> Parts:
    """Build this rank's part of everything. Collective. Raises RecipeError for what validation can only see here."""
    layout = recipe.validate(communicator.size)
    if corpus.vocab != recipe.model.vocab:
        raise RecipeError(f"the data have {corpus.vocab} tokens, not {recipe.model.vocab}; give model.vocab={corpus.vocab}")
    mesh = Mesh.build(layout, communicator)
    count = recipe.data.global_batch // (layout.data * recipe.train.micro_batch)
    schedule = with_messages(compute_schedule(recipe.parallel.schedule, layout.pipeline, count))
    check(schedule, count)
    dtype = getattr(torch, recipe.train.dtype)
    model = build_model(recipe, mesh, dtype)
    buckets = build_buckets(model, _plan(recipe), mesh, recipe.parallel.zero, recipe.parallel.bucket_bytes)
    length = recipe.data.sequence_length // (layout.tensor if recipe.parallel.sequence else 1)
    runner = PipelineRunner(
        stage=model,
        mesh=mesh,
        activation_shape=(recipe.train.micro_batch, length, recipe.model.hidden),
        activation_dtype=dtype,
        device=communicator.device,
    )
    reducer = GradientReducer(buckets, mesh, fused=not recipe.train.compile)
    optimizer = ShardedAdamW(buckets, recipe.optim)
    return Parts(
        recipe=recipe,
        mesh=mesh,
        model=model,
        corpus=corpus,
        batches=Batches(corpus, recipe.data, recipe.run.seed),
        runner=runner,
        actions=schedule[mesh.at("pipeline")],
        buckets=buckets,
        reducer=reducer,
        optimizer=optimizer,
        scaler=LossScaler.for_dtype(recipe.train.dtype),
        guard=Guard(recipe.guard, mesh, reducer, optimizer, recipe.checkpoint.every),
        device=communicator.device,
    )


def build_model(recipe: Recipe, mesh: Mesh, dtype: torch.dtype) -> Decoder:
    """This stage's layers, in this rank's slices, initialised."""
    config = recipe.model
    layers = split_layers(config.layers, mesh.layout.pipeline, recipe.parallel.balance)[mesh.at("pipeline")]
    with torch.device("meta"):
        model = Decoder(config, layers, mesh.first_stage, mesh.last_stage, recipe.train.recompute == "full")
    fill = partial(decoder_values, recipe.run.seed, config.initial_std, config.layers)
    parallelize(model, _plan(recipe), mesh, recipe.parallel.sequence, dtype, fill)
    if recipe.train.compile:
        for layer in model.layers.values():
            layer.compile()
    return model


def _plan(recipe: Recipe) -> ShardingPlan:
    return decoder_plan(recipe.model, recipe.parallel.sequence)
