"""One optimizer step: forward and backward of every micro-batch, reduce, agree, clip, update.

The step is a transaction: the update happens on every rank or on none, decided by figures that every rank holds alike.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bagualu.parallel.pipeline.runtime import MicroBatch, Seeds, StageTotals
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
    saving: tuple[float, float] = (0.0, 0.0)
    """How many ranks still write their part of the checkpoint under way, and how many have failed to."""


def train_step(
    parts: Parts,
    step: int,
    stop: Callable[[], bool] = lambda: False,
    saving: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0),
) -> StepResult:
    """Do step `step` (from 0). `stop` says whether this rank has been asked to stop, `saving` how far its part of a checkpoint is
    (`Saver.status`); the ranks tell each other here."""
    recipe, monitor = parts.recipe, parts.mesh.monitor
    monitor.step = step + 1
    monitor.at("data")
    micro_batches = local_micro_batches(parts, step)
    tokens = _count_tokens(parts, micro_batches)
    lr = learning_rate(recipe.optim, step, recipe.train.steps)

    parts.reducer.begin(len(micro_batches))
    totals = parts.runner.run(parts.actions, micro_batches, _seeds(parts, tokens))
    monitor.at("reduce")
    parts.reducer.finish()

    monitor.at("agree")
    agreed = _agree(parts, totals, stop, saving)
    norm = agreed.norm_squared**0.5 / parts.scaler.scale
    committed = math.isfinite(norm) and math.isfinite(agreed.loss)
    if committed:
        clip = recipe.optim.clip_norm
        factor = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
        monitor.at("optimizer")
        parts.optimizer.step(lr, factor / parts.scaler.scale)
        parts.updates += 1
    parts.scaler.update(committed)
    balance = agreed.balance / recipe.data.global_batch
    return StepResult(agreed.loss / tokens, balance, norm, lr, committed, agreed.stop, agreed.saving)


def local_micro_batches(parts: Parts, step: int) -> list[MicroBatch]:
    """This data rank's share of the step's global batch."""
    recipe, size = parts.recipe, parts.recipe.train.micro_batch
    share = recipe.data.global_batch // parts.mesh.layout.data
    first = share * parts.mesh.at("data")
    pairs = (parts.batches.batch(step, start, size) for start in range(first, first + share, size))
    return [MicroBatch(inputs.to(parts.device), labels.to(parts.device)) for inputs, labels in pairs]


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
    saving: tuple[float, float]


def _agree(parts: Parts, totals: StageTotals, stop: Callable[[], bool], saving: Callable[[], tuple[float, float]]) -> _Agreed:
    """The one reduction over all ranks that a step needs: every figure counted where exactly one rank holds it."""
    norm_squared = torch.zeros((), dtype=torch.float64, device=parts.device)
    for bucket in parts.buckets:
        if bucket.owned:
            norm_squared += bucket.norm_squared()
    told = norm_squared.new_tensor([float(stop()), *saving()])  # as late as can be: a signal during the step counts for it
    once = float(parts.mesh.reports)
    norm_squared_sum, loss, balance, stops, writing, failed = parts.mesh.sum_over_world(
        norm_squared, totals.loss * once, totals.auxiliary * once, *told
    )
    return _Agreed(norm_squared_sum, loss, balance, stops > 0, (writing, failed))
