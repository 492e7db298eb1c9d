"""Builds everything that a step needs on a rank from a recipe. The function `assemble` shows the order."""

from dataclasses import dataclass

import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.guard.guard import Guard
from bagualu.parallel.balance.stages.cost import CostTable
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.parallelize import Fill
from bagualu.parallel.pipeline.check import check
from bagualu.parallel.pipeline.program import Program, program
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.parallel.pipeline.runtime import PipelineRunner
from bagualu.parallel.pipeline.schedules.schedule import Schedule, with_messages
from bagualu.parallel.precision import chip_of
from bagualu.trainer.costs.choose_split import agree_on_shares, agree_on_split
from bagualu.trainer.data.ahead import ReadAhead
from bagualu.trainer.data.batches import Batches
from bagualu.trainer.data.tokenised import Corpus
from bagualu.trainer.engine.build import hold
from bagualu.trainer.engine.protocol import Engine
from bagualu.trainer.models.decoder.initialise import seeded_values
from bagualu.trainer.optim.scaler import LossScaler
from bagualu.trainer.recipe.config import Recipe


@dataclass
class TrainerState:
    """Everything on this rank that a step works with."""

    recipe: Recipe
    mesh: Mesh
    shares: list[int]
    """The number of micro-batches in a step, for each data rank."""
    split: Split
    """The layers of each stage, and what they recompute."""
    costs: CostTable | None
    """The costs of layers from which `split` was computed or checked; None if the recipe needs no costs."""
    engine: Engine
    """This rank's layers, gradients and optimizer state."""
    corpus: Corpus
    batches: Batches
    runner: PipelineRunner
    schedule: Schedule
    """The actions of all ranks of this rank's pipeline in a step, messages included."""
    heaviest: Schedule
    """The schedule of the data ranks with the most micro-batches; the time of a step under a split is predicted
    from this schedule."""
    program: Program
    """This rank's part of `schedule`."""
    scaler: LossScaler
    guard: Guard
    device: torch.device
    ahead: ReadAhead[list[tuple[torch.Tensor, ...]]] | None = None
    """Reads the samples of the next steps ahead, in a run; None: they are read when they are needed."""
    updates: int = 0
    """The number of optimizer updates applied so far; steps that were left out or discarded have none."""

    def take(self, split: Split, engine: Engine, step: int) -> None:
        """Replaces split and engine after `step` steps. `engine` holds this rank's stages of `split`. A new guard for the engine
        takes over the memory of the previous guard."""
        self.split, self.engine = split, engine
        self.runner.model, self.runner.weight_gradients = engine.slices, engine
        before, self.guard = self.guard, _guard(self.recipe, self.mesh, engine)
        self.guard.load(before.memory.as_json(), step)
        self.guard.clean = before.clean


def assemble(
    recipe: Recipe,
    communicator: Communicator,
    corpus: Corpus,
    fill: Fill | None = None,
    split: tuple[Split, CostTable | None] | None = None,
) -> TrainerState:
    """Builds the state with which this rank trains. Collective.

    `fill` gives the initial values of weights and buffers; by default they are drawn from run.seed. `split` gives the layers of
    each stage, and the costs from which they were computed, if any; by default the ranks agree on them. Raises RecipeError for an
    invalid recipe, also if only the data or the device show that it is (model.vocab, parallel.memory_bytes, guard.audit_every).
    """
    layout = recipe.validate(communicator.size)
    choose_kernels(recipe, communicator.device)
    if corpus.vocab != recipe.model.vocab:
        raise RecipeError(f"the data have {corpus.vocab} tokens, not {recipe.model.vocab}; give model.vocab={corpus.vocab}")
    parallel = recipe.parallel
    shares = agree_on_shares(recipe, layout, communicator)
    own = shares[layout.coordinates(communicator.rank)["data"]]
    schedule, heaviest = (
        with_messages(compute_schedule(parallel.schedule, layout.pipeline, count, parallel.virtual_stages))
        for count in (own, max(shares))
    )
    check(schedule)
    mesh = Mesh.build(layout, communicator, schedule.placement)
    layers, costs = split or agree_on_split(recipe, layout, heaviest, communicator)
    engine = hold(recipe, mesh, layers, fill or seeded_values(recipe.model, recipe.run.seed))
    engine.open()
    length = recipe.data.sequence_length // (layout.tensor if parallel.sequence else 1)
    runner = PipelineRunner(
        model=engine.slices,
        mesh=mesh,
        weight_gradients=engine,
        activation_shape=(recipe.train.micro_batch, length, recipe.model.hidden),
        activation_dtype=getattr(torch, recipe.train.stored_dtype),
        device=communicator.device,
    )
    return TrainerState(
        recipe=recipe,
        mesh=mesh,
        shares=shares,
        split=layers,
        costs=costs,
        engine=engine,
        corpus=corpus,
        batches=Batches(corpus, recipe.data, recipe.run.seed),
        runner=runner,
        schedule=schedule,
        heaviest=heaviest,
        program=program(schedule, mesh.at("pipeline")),
        scaler=LossScaler.for_dtype(recipe.train.dtype),
        guard=_guard(recipe, mesh, engine),
        device=communicator.device,
    )


def choose_kernels(recipe: Recipe, device: torch.device) -> None:
    """Makes an accelerator use kernels that add up in at least float32 and, with train.deterministic, repeat their results bit by
    bit."""
    if device.type in ("cpu", "meta"):
        return
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # none is read here
    torch.use_deterministic_algorithms(recipe.train.deterministic)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _guard(recipe: Recipe, mesh: Mesh, engine: Engine) -> Guard:
    device = mesh.group("world").device
    repeatable = recipe.train.deterministic and chip_of(device) in ("cpu", "cuda")
    if recipe.guard.audit_every and not repeatable:
        raise RecipeError(f"guard.audit_every={recipe.guard.audit_every} compares two computations bit by bit, which {device.type} "
                          "devices are not known to repeat; give guard.audit_every=0")  # fmt: skip
    return Guard(recipe.guard, mesh, engine, recipe.checkpoint.every, repeatable, recipe.train.steps)
