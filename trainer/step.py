"""One optimizer step: forward and backward of every micro-batch, reduce, agree, clip, update.

The step is a transaction: the update happens on every rank or on none, decided by figures that every rank holds alike.
"""

from dataclasses import dataclass

import torch

from bagualu.comm.group import Group
from bagualu.parallel.pipeline.runtime import MicroBatch, Seeds, StageTotals
from bagualu.parallel.pipeline.schedule import Action, compute_schedule, with_messages
from bagualu.parallel.vocabulary import IGNORED
from bagualu.trainer.assemble import Parts
from bagualu.trainer.optim.schedule import learning_rate


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every rank."""

    loss: float
    """Cross-entropy per token over the global batch, in nats."""
    balance_loss: float
    """Load-balancing loss, averaged over sequences, summed over layers; 1 per mixture layer when the load is even."""
    grad_norm: float
    """Norm of the whole model's gradient before clipping, each element counted once."""
    lr: float
    committed: bool
    """False: the gradient was not finite and nothing was changed."""
    stop: bool
    """Whether any rank has been asked to stop."""


def train_step(parts: Parts, step: int, stop: bool = False) -> StepResult:
    """Do step `step` (from 0). `stop` says whether this rank has been asked to stop; the ranks agree on it here."""
    recipe = parts.recipe
    micro_batches = local_micro_batches(parts, step)
    tokens = _count_tokens(parts, micro_batches)
    lr = learning_rate(recipe.optim, step, recipe.train.steps)

    parts.reducer.begin(len(micro_batches))
    totals = parts.runner.run(actions(parts, len(micro_batches)), micro_batches, _seeds(parts, tokens))
    parts.reducer.finish()

    agreed = _agree(parts, totals, stop)
    norm = agreed.norm_squared**0.5 / parts.scaler.scale
    committed = bool(torch.isfinite(torch.tensor([norm, agreed.loss])).all())
    if committed:
        clip = recipe.optim.clip_norm
        factor = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
        parts.optimizer.step(lr, factor / parts.scaler.scale)
        parts.updates += 1
    parts.scaler.update(committed)
    return StepResult(agreed.loss / tokens, agreed.balance / recipe.data.global_batch, norm, lr, committed, agreed.stop)


def local_micro_batches(parts: Parts, step: int) -> list[MicroBatch]:
    """This data rank's share of the step's global batch."""
    recipe, size = parts.recipe, parts.recipe.train.micro_batch
    share = recipe.data.global_batch // parts.mesh.layout.data
    first = share * parts.mesh.at("data")
    pairs = (parts.batches.batch(step, start, size) for start in range(first, first + share, size))
    return [MicroBatch(inputs.to(parts.device), labels.to(parts.device)) for inputs, labels in pairs]


def actions(parts: Parts, micro_batches: int) -> list[Action]:
    """This stage's list of the recipe's schedule."""
    stages = parts.mesh.layout.pipeline
    return with_messages(compute_schedule(parts.recipe.parallel.schedule, stages, micro_batches))[parts.mesh.at("pipeline")]


def _count_tokens(parts: Parts, micro_batches: list[MicroBatch]) -> float:
    """Tokens of the global batch that take part in the loss."""
    counted = torch.stack([(batch.labels != IGNORED).sum() for batch in micro_batches]).sum().double()
    parts.mesh.group("fold").all_reduce(counted)
    return max(1.0, counted.item())


def _seeds(parts: Parts, tokens: float) -> Seeds:
    """Derivatives of the objective: mean loss per token + coefficient * mean balance loss per sequence, times the loss scale.

    Tensor ranks of a mixture all compute the same balance loss, and its gradients are summed over them: each seeds its share.
    """
    scale = parts.scaler.scale
    share = parts.recipe.data.global_batch * parts.mesh.layout.tensor
    return Seeds(loss=scale / tokens, auxiliary=scale * parts.recipe.model.moe.balance_loss / share)


@dataclass(frozen=True)
class _Agreed:
    norm_squared: float
    loss: float
    balance: float
    stop: bool


def _agree(parts: Parts, totals: StageTotals, stop: bool) -> _Agreed:
    """The one reduction over all ranks that a step needs: every figure counted where exactly one rank holds it."""
    norm_squared = torch.zeros((), dtype=torch.float64, device=parts.device)
    for bucket in parts.buckets:
        if bucket.owned:
            norm_squared += torch.linalg.vector_norm(bucket.shard_gradients).double() ** 2
    once = float(parts.mesh.at("tensor") == 0)
    asked = torch.tensor(float(stop), dtype=torch.float64, device=parts.device)
    figures = torch.stack([norm_squared, totals.loss * once, totals.auxiliary * once, asked])
    return _Agreed(*_sum_over_world(figures, parts.mesh.group("world")))


def _sum_over_world(figures: torch.Tensor, world: Group) -> tuple[float, float, float, bool]:
    world.all_reduce(figures)
    norm_squared, loss, balance, asked = figures.tolist()
    return norm_squared, loss, balance, asked > 0
