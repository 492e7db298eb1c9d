"""One optimizer step: forward and backward of every micro-batch, reduce, agree, decide, and only then clip, update and share.

The step is a transaction: the update happens on every rank or on none, decided by figures that every rank holds alike
(fault_tolerance/guard). A step that is computed again begins from the same weights and samples, because nothing has changed them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bagualu.comm.monitor import Phase
from bagualu.fault_tolerance.guard.guard import StepValues
from bagualu.fault_tolerance.guard.verdict import Cause, GuardAction, GuardDecision
from bagualu.parallel.pipeline.runtime import MicroBatch, Seeds, StageTotals
from bagualu.parallel.vocabulary import IGNORED
from bagualu.trainer.assemble import TrainerState
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
    state: TrainerState,
    step: int,
    stop: Callable[[], bool] = lambda: False,
    saving: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0),
) -> StepResult:
    """Do step `step` (from 0). `stop` says whether this rank has been asked to stop, `saving` how far its part of a checkpoint is
    (`Saver.status`); the ranks tell each other here."""
    number, guard, engine, monitor = step + 1, state.guard, state.engine, state.mesh.monitor

    def tell() -> list[float]:
        return [float(stop()), *saving()]

    monitor.step = number
    lr = learning_rate(state.recipe.optim, step, state.recipe.train.steps)
    if why := guard.leaves_out(number):
        return _leave_out(state, number, lr, why, tell)
    results: list[StepResult] = []
    samples: int | None = (first := guard.begin(number))
    while samples is not None:
        monitor.at(Phase.DATA)
        micro_batches = local_micro_batches(state, samples - 1)
        tokens = _count_tokens(state, micro_batches)
        engine.begin(len(micro_batches))
        engine.model.begin_step()
        totals = state.runner.run(state.program, micro_batches, _seeds(state, tokens))
        monitor.at(Phase.REDUCE)
        engine.finish()
        monitor.at(Phase.AGREE)
        agreed = _agree(state, totals, tokens, guard.inspect(number), tell)
        if not guard.weighing:
            judged = agreed
        verdict = guard.judge(number, StepValues(agreed.loss, agreed.norm, agreed.found, state.scaler.can_fall))
        if verdict.action is GuardAction.RETRY:
            monitor.at(Phase.DISCARD)
            samples = guard.samples
            continue
        if verdict.action is GuardAction.COMMIT and not _update(state, lr, judged.norm, guard.strongest):
            verdict = guard.judge_update(number, engine.spoilt())
        _count_update(state, verdict)
        results.append(StepResult(judged.loss, judged.balance, judged.norm, lr, verdict, judged.stop, judged.saving))
        samples = guard.finish(verdict)
    if len(results) == 1:
        return results[0]
    return replace(results[1], late=first, late_verdict=results[0].verdict)


def _leave_out(state: TrainerState, number: int, lr: float, why: str, tell: Tell) -> StepResult:
    """A step whose samples are not to be learnt from."""
    state.mesh.monitor.at(Phase.AGREE)
    stops, writing, failed = state.mesh.sum_over("world", *(_scalar(state, one) for one in tell()))
    state.guard.expect(number + 1)
    verdict = GuardDecision(GuardAction.SKIP, attempts=0, text=f"step {number} is left out: {why}")
    return StepResult(math.nan, math.nan, math.nan, lr, verdict, stops > 0, (writing, failed))


def _count_update(state: TrainerState, verdict: GuardDecision) -> None:
    """After the samples have been judged and, where they were to be, learnt from."""
    committed = verdict.action is GuardAction.COMMIT
    state.updates += committed
    if committed:
        state.engine.model.end_step(state.mesh.group("fold"))
    else:
        state.mesh.monitor.at(Phase.DISCARD)
    if committed or verdict.cause is Cause.OVERFLOW:
        state.scaler.update(committed)


def _update(state: TrainerState, lr: float, norm: float, most: float = math.inf) -> bool:
    """Update every rank's shard of the weights and moments; whether all of it is finite on all ranks. Only then is it shared.

    `most`: the norm to which the gradient is reduced, besides optim.clip_norm.
    """
    clip = state.recipe.optim.clip_norm
    most = min(most, clip) if clip > 0 else most
    factor = min(1.0, most / (norm + 1e-6))
    state.mesh.monitor.at(Phase.OPTIMIZER)
    state.engine.step(lr, factor / state.scaler.scale)
    (spoilt,) = state.mesh.sum_over("world", _scalar(state, len(state.engine.spoilt())))
    if not spoilt:
        state.engine.share()
    return not spoilt


def local_micro_batches(state: TrainerState, step: int) -> list[MicroBatch]:
    """This data rank's share of the step's global batch."""
    size, place = state.recipe.train.micro_batch, state.mesh.at("data")
    first, share = sum(state.shares[:place]) * size, state.shares[place] * size
    pairs = (state.batches.batch(step, start, size) for start in range(first, first + share, size))
    return [MicroBatch(inputs.to(state.device), labels.to(state.device)) for inputs, labels in pairs]


def _count_tokens(state: TrainerState, micro_batches: list[MicroBatch]) -> float:
    """Tokens of the global batch that take part in the loss."""
    (counted,) = state.mesh.sum_over("fold", torch.stack([(batch.labels != IGNORED).sum() for batch in micro_batches]).sum())
    return max(1.0, counted)


def _seeds(state: TrainerState, tokens: float) -> Seeds:
    """Derivatives of the objective: mean loss per token + coefficient * mean balance loss per sequence, times the loss scale.

    Tensor ranks of a mixture all compute the same balance loss, and its gradients are summed over them: each seeds its share.
    """
    scale = state.scaler.scale
    share = state.recipe.data.global_batch * state.mesh.layout.tensor
    return Seeds(loss=scale / tokens, auxiliary=scale * state.recipe.model.moe.balance_loss / share)


@dataclass(frozen=True)
class _Agreed:
    """The values of an attempt, as in StepResult, and what the guards found."""

    loss: float
    balance: float
    norm: float
    found: list[float]
    stop: bool
    saving: tuple[float, float]


def _agree(state: TrainerState, totals: StageTotals, tokens: float, found: list[torch.Tensor], tell: Tell) -> _Agreed:
    """The one reduction over all ranks that a step needs: every figure counted where exactly one rank holds it."""
    told = [_scalar(state, one) for one in tell()]  # as late as can be: a signal during the step counts for it
    once = float(state.mesh.reports)
    squared, loss, balance, stops, writing, failed, *findings = state.mesh.sum_over(
        "world", state.engine.norm_squared(), totals.loss * once, totals.auxiliary * once, *told, *found
    )
    norm = squared**0.5 / state.scaler.scale
    return _Agreed(loss / tokens, balance / state.recipe.data.global_batch, norm, findings, stops > 0, (writing, failed))


def _scalar(state: TrainerState, value: float) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device=state.device)
