"""One optimizer step: forward and backward of every micro-batch, reduce, agree, decide, and only then clip, update and share.

The step is a transaction: the update happens on every rank or on none, decided by values that are the same on every rank
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

Report = Callable[[], list[float]]
"""A function that returns three numbers, each 1 or 0, that a rank reports to the others in a step: whether it was asked to stop,
whether it is still writing a checkpoint, and whether it failed to write it."""


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every rank. If the step was excluded before it was computed, loss, balance loss and norm are
    NaN."""

    loss: float
    """Cross-entropy per token over the global batch, in nats."""
    balance_loss: float
    """Load-balancing loss, averaged over sequences, summed over layers; 1 per mixture layer when the load is even."""
    grad_norm: float
    """Norm of the whole model's gradient before clipping and without the loss scale, each element counted once."""
    lr: float
    """Learning rate of the step, also if no update was applied."""
    verdict: GuardDecision
    """The guard's decision about the samples of this step: whether their update was applied, and if not, why."""
    stop: bool
    """Whether any rank has been asked to stop."""
    saving: tuple[float, float] = (0.0, 0.0)
    """The number of ranks that are still writing their part of a checkpoint, and the number of ranks that failed to write it."""

    late: int | None = None
    """The step (from 1) whose deferred samples were computed before the samples of this step; None if none were."""
    late_verdict: GuardDecision | None = None
    """The guard's decision about the deferred samples of step `late`; None if none were computed."""

    @property
    def committed(self) -> bool:
        """Whether the update from the samples of this step was applied. Deferred samples have a decision of their own,
        `late_verdict`."""
        return self.verdict.action is GuardAction.COMMIT


def train_step(
    state: TrainerState,
    step: int,
    stop: Callable[[], bool] = lambda: False,
    saving: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0),
) -> StepResult:
    """Trains step `step` (from 0) and returns what happened. Collective.

    `stop` returns whether this rank has been asked to stop, `saving` the state of its part of a checkpoint (`Saver.status`). Both
    are called on every rank in each attempt at the step, and the results reach all ranks.
    """
    number, guard, engine, monitor = step + 1, state.guard, state.engine, state.mesh.monitor

    def report() -> list[float]:
        return [float(stop()), *saving()]

    monitor.step = number
    lr = learning_rate(state.recipe.optim, step, state.recipe.train.steps)
    if why := guard.leaves_out(number):
        return _leave_out(state, number, lr, why, report)
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
        agreed = _agree(state, totals, tokens, guard.inspect(number), report)
        if not guard.weighing:
            judged = agreed
        verdict = guard.judge(number, StepValues(agreed.loss, agreed.norm, agreed.inspected, state.scaler.can_fall))
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


def _leave_out(state: TrainerState, number: int, lr: float, why: str, report: Report) -> StepResult:
    """Returns the result of a step whose samples must not be trained on, without computing it; `why` is the reason. Collective."""
    state.mesh.monitor.at(Phase.AGREE)
    stops, writing, failed = state.mesh.sum_over("world", *(_scalar(state, value) for value in report()))
    state.guard.expect(number + 1)
    verdict = GuardDecision(GuardAction.SKIP, attempts=0, text=f"step {number} is left out: {why}")
    return StepResult(math.nan, math.nan, math.nan, lr, verdict, stops > 0, (writing, failed))


def _count_update(state: TrainerState, verdict: GuardDecision) -> None:
    """Call after the guard's decision `verdict`. If the update was applied, counts it and changes the model's buffers. After an
    applied update or a float16 overflow, adapts the loss scale."""
    committed = verdict.action is GuardAction.COMMIT
    state.updates += committed
    if committed:
        state.engine.model.end_step(state.mesh.group("fold"))
    else:
        state.mesh.monitor.at(Phase.DISCARD)
    if committed or verdict.cause is Cause.OVERFLOW:
        state.scaler.update(committed)


def _update(state: TrainerState, lr: float, norm: float, most: float = math.inf) -> bool:
    """Updates weights and moments. Returns whether the result is finite on all ranks. Collective.

    `most`: the largest norm that the gradient may have; a larger one is clipped, as by optim.clip_norm.
    """
    clip = state.recipe.optim.clip_norm
    most = min(most, clip) if clip > 0 else most
    factor = min(1.0, most / (norm + 1e-6))
    state.mesh.monitor.at(Phase.OPTIMIZER)
    state.engine.step(lr, factor / state.scaler.scale)
    (spoilt,) = state.mesh.sum_over("world", _scalar(state, len(state.engine.spoilt())))
    return not spoilt


def local_micro_batches(state: TrainerState, step: int) -> list[MicroBatch]:
    """Returns the micro-batches of the global batch of `step` (from 0) that this data rank computes."""
    rows = read_samples(state, step) if state.ahead is None else state.ahead.take(step)
    return [MicroBatch(*(tensor.to(state.device) for tensor in tensors)) for tensors in rows]


def read_samples(state: TrainerState, step: int) -> list[tuple[torch.Tensor, ...]]:
    """Returns the tensors of the same micro-batches in host memory."""
    size, data_rank = state.recipe.train.micro_batch, state.mesh.at("data")
    first, share = sum(state.shares[:data_rank]) * size, state.shares[data_rank] * size
    return [state.batches.batch(step, start, size) for start in range(first, first + share, size)]


def _count_tokens(state: TrainerState, micro_batches: list[MicroBatch]) -> float:
    """Returns the number of labels of the global batch that the loss does not ignore, at least 1. Collective."""
    (counted,) = state.mesh.sum_over("fold", torch.stack([(batch.labels != IGNORED).sum() for batch in micro_batches]).sum())
    return max(1.0, counted)


def _seeds(state: TrainerState, tokens: float) -> Seeds:
    """Returns the derivatives of the objective with respect to a micro-batch's summed loss and to its balance loss, from which
    backward passes start.

    The objective is the mean loss per token plus a coefficient times the mean balance loss per sequence, all times the loss scale.
    All tensor ranks compute the same balance loss, and gradients are summed over them, so the seed of the balance loss is divided
    by their number.
    """
    scale = state.scaler.scale
    share = state.recipe.data.global_batch * state.mesh.layout.tensor
    return Seeds(loss=scale / tokens, auxiliary=scale * state.recipe.model.moe.balance_loss / share)


@dataclass(frozen=True)
class _Agreed:
    """The results of an attempt, reduced over all ranks: fields as in StepResult, and `inspected`, the sums of `Guard.inspect`."""

    loss: float
    balance: float
    norm: float
    inspected: list[float]
    stop: bool
    saving: tuple[float, float]


def _agree(state: TrainerState, totals: StageTotals, tokens: float, inspected: list[torch.Tensor], report: Report) -> _Agreed:
    """Sums the results of an attempt over all ranks, in a single reduction. Of ranks that hold the same loss or gradient elements,
    exactly one contributes them. Collective."""
    reported = [_scalar(state, value) for value in report()]  # as late as possible: a signal during the step counts for this step
    once = float(state.mesh.reports)
    squared, loss, balance, stops, writing, failed, *findings = state.mesh.sum_over(
        "world", state.engine.norm_squared(), totals.loss * once, totals.auxiliary * once, *reported, *inspected
    )
    norm = squared**0.5 / state.scaler.scale
    return _Agreed(loss / tokens, balance / state.recipe.data.global_batch, norm, findings, stops > 0, (writing, failed))


def _scalar(state: TrainerState, value: float) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device=state.device)
