"""One optimizer step: forward and backward of every micro-batch, reduce, agree, decide, and only then clip, update and share.

The step is a transaction: the update happens on every rank or on none, decided by figures that every rank holds alike
(fault_tolerance/guard). A step that is computed again begins from the same weights and samples, because nothing has changed them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bagualu.fault_tolerance.guard.guard import StepValues
from bagualu.fault_tolerance.guard.verdict import Cause, GuardAction, GuardDecision
from bagualu.parallel.pipeline.runtime import MicroBatch, Seeds, StageTotals
from bagualu.parallel.vocabulary import IGNORED
from bagualu.trainer.assemble import Parts
from bagualu.trainer.optim.schedule import learning_rate

Tell = Callable[[], list[float]]
"""What a rank has to tell the others in a step beside its figures: asked to stop, still writing, failed to write; 1 or 0 each."""


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every rank. A step that was left out unseen has figures of NaN."""

    loss: float
    """Cross-entropy per token over the global batch, in nats."""
    balance_loss: float
    """Load-balancing loss, averaged over sequences, summed over layers; 1 per mixture layer when the load is even."""
    grad_norm: float
    """Norm of the whole model's gradient before clipping, each element counted once."""
    lr: float
    verdict: GuardDecision
    """Whether the update happened, and what was wrong."""
    stop: bool
    """Whether any rank has been asked to stop."""
    saving: tuple[float, float] = (0.0, 0.0)
    """How many ranks still write their part of the checkpoint under way, and how many have failed to."""

    late: int | None = None
    """The step (from 1) whose samples, deferred before, were computed before those of this step."""
    late_verdict: GuardDecision | None = None

    @property
    def committed(self) -> bool:
        """False: nothing was changed."""
        return self.verdict.action is GuardAction.COMMIT


def train_step(
    parts: Parts,
    step: int,
    stop: Callable[[], bool] = lambda: False,
    saving: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0),
) -> StepResult:
    """Do step `step` (from 0). `stop` says whether this rank has been asked to stop, `saving` how far its part of a checkpoint is
    (`Saver.status`); the ranks tell each other here."""
    number, guard = step + 1, parts.guard

    def tell() -> list[float]:
        return [float(stop()), *saving()]

    parts.mesh.monitor.step = number
    lr = learning_rate(parts.recipe.optim, step, parts.recipe.train.steps)
    if why := guard.leaves_out(number):
        return _leave_out(parts, number, lr, why, tell)
    late = guard.due(number)
    if late is None:
        return _transact(parts, number, lr, tell)
    first = _transact(parts, number, lr, tell, late)
    if first.verdict.action in (GuardAction.ROLLBACK, GuardAction.STOP):
        return first
    return replace(_transact(parts, number, lr, tell), late=late, late_verdict=first.verdict)


def _transact(parts: Parts, number: int, lr: float, tell: Tell, late: int | None = None) -> StepResult:
    """Compute, judge, and update or not, in step `number` (from 1); with the samples of step `late` if that is given."""
    guard = parts.guard
    guard.begin(number, late)
    while True:
        agreed = _attempt(parts, (late or number) - 1, tell)
        verdict = guard.judge(number, StepValues(agreed.loss, agreed.norm, agreed.found, parts.scaler.can_fall))
        if verdict.action is not GuardAction.RETRY:
            break
        parts.mesh.monitor.at("discard")
    if verdict.deferred and (known := guard.memory.newest):
        again = _attempt(parts, known[0] - 1, tell)
        verdict = guard.weigh(number, verdict, again.loss, again.norm, parts.scaler.can_fall)
    if verdict.action is GuardAction.COMMIT and not _update(parts, lr, agreed.norm, guard.strongest):
        verdict = guard.judge_update(number, parts.optimizer.spoilt())
    if verdict.action is GuardAction.COMMIT:
        parts.updates += 1
    else:
        parts.mesh.monitor.at("discard")
    if verdict.action is GuardAction.COMMIT or verdict.cause is Cause.OVERFLOW:
        parts.scaler.update(verdict.action is GuardAction.COMMIT)
    guard.finish(number, agreed.loss, agreed.norm, verdict)
    return StepResult(agreed.loss, agreed.balance, agreed.norm, lr, verdict, agreed.stop, agreed.saving)


def _leave_out(parts: Parts, number: int, lr: float, why: str, tell: Tell) -> StepResult:
    """A step whose samples are not to be learnt from."""
    parts.mesh.monitor.at("agree")
    stops, writing, failed = parts.mesh.sum_over_world(*(_scalar(parts, one) for one in tell()))
    parts.guard.expect(number + 1)
    verdict = GuardDecision(GuardAction.SKIP, attempts=0, text=f"step {number} is left out: {why}")
    return StepResult(math.nan, math.nan, math.nan, lr, verdict, stops > 0, (writing, failed))


def _attempt(parts: Parts, step: int, tell: Tell) -> "_Agreed":
    """Compute the gradient on the samples of step `step` (from 0), reduce it, and agree on the figures. Changes nothing but
    gradients. The step under way may be a later one."""
    monitor = parts.mesh.monitor
    monitor.at("data")
    micro_batches = local_micro_batches(parts, step)
    tokens = _count_tokens(parts, micro_batches)
    parts.reducer.begin(len(micro_batches))
    totals = parts.runner.run(parts.program, micro_batches, _seeds(parts, tokens))
    monitor.at("reduce")
    parts.reducer.finish()
    monitor.at("agree")
    found = parts.guard.inspect(monitor.step)
    return _agree(parts, totals, tokens, found, tell)


def _update(parts: Parts, lr: float, norm: float, most: float = math.inf) -> bool:
    """Update every rank's shard of the weights and moments; whether all of it is finite on all ranks. Only then is it shared.

    `most`: the norm to which the gradient is reduced, besides optim.clip_norm.
    """
    clip = parts.recipe.optim.clip_norm
    most = min(most, clip) if clip > 0 else most
    factor = min(1.0, most / (norm + 1e-6))
    parts.mesh.monitor.at("optimizer")
    parts.optimizer.step(lr, factor / parts.scaler.scale)
    (spoilt,) = parts.mesh.sum_over_world(_scalar(parts, len(parts.optimizer.spoilt())))
    if not spoilt:
        parts.optimizer.share()
    return not spoilt


def local_micro_batches(parts: Parts, step: int) -> list[MicroBatch]:
    """This data rank's share of the step's global batch."""
    size, place = parts.recipe.train.micro_batch, parts.mesh.at("data")
    first, share = sum(parts.shares[:place]) * size, parts.shares[place] * size
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
    """The values of an attempt, as in StepResult, and what the guards found."""

    loss: float
    balance: float
    norm: float
    found: list[float]
    stop: bool
    saving: tuple[float, float]


def _agree(parts: Parts, totals: StageTotals, tokens: float, found: list[torch.Tensor], tell: Tell) -> _Agreed:
    """The one reduction over all ranks that a step needs: every figure counted where exactly one rank holds it."""
    norm_squared, copies = _scalar(parts, 0.0), _scalar(parts, 0.0)
    for bucket in parts.buckets:
        if bucket.owned:
            norm_squared += bucket.norm_squared()
        else:
            copies += bucket.norm_squared()
    # A copy does not count in the norm, but a rank would update with it: one that is not finite makes the sum so.
    norm_squared += copies * 0.0
    told = [_scalar(parts, one) for one in tell()]  # as late as can be: a signal during the step counts for it
    once = float(parts.mesh.reports)
    squared, loss, balance, stops, writing, failed, *findings = parts.mesh.sum_over_world(
        norm_squared, totals.loss * once, totals.auxiliary * once, *told, *found
    )
    norm = squared**0.5 / parts.scaler.scale
    return _Agreed(loss / tokens, balance / parts.recipe.data.global_batch, norm, findings, stops > 0, (writing, failed))


def _scalar(parts: Parts, value: float) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device=parts.device)
