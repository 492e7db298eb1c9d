"""The loop over steps: train, record, validate, save, and stop where asked."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bagualu.fault_tolerance.checkpoint.format import step_of
from bagualu.trainer.assemble import Parts
from bagualu.trainer.checkpoints import Checkpoints
from bagualu.trainer.evaluate import Validation, validate
from bagualu.trainer.outcome import FinalError
from bagualu.trainer.replication import Replication
from bagualu.trainer.sinks import Sink
from bagualu.trainer.step import StepResult, train_step

_MOST_DISCARDED = 50
"""float16: steps discarded in a row before the run gives up; the loss scale has then fallen from any value to 1."""


class DivergedError(FinalError):
    """Loss or gradient is no longer finite."""


@dataclass
class Loop:
    """`seconds_per_token_at_ceiling`: what a token would take if the machine did nothing but multiply matrices at its best."""

    parts: Parts
    sinks: Sequence[Sink]
    stop: Callable[[], bool]
    seconds_per_token_at_ceiling: float
    checkpoints: Checkpoints
    replication: Replication | None = None
    _discarded: int = 0
    _busy_seconds: float = 0.0
    _steps_done: int = 0

    def run(self, first_step: int) -> dict[str, Any]:
        """Steps first_step .. train.steps; returns how it ended and the last figures."""
        steps, every = self.parts.recipe.train.steps, self.parts.recipe.checkpoint.every
        step, stopped = first_step, False
        record: dict[str, Any] = {}
        while step < steps and not stopped:
            result, seconds = self._timed_step(step)
            step += 1
            stopped = result.stop
            if stopped and self.sinks:  # on the rank that speaks, which may not be the one that was asked
                print(f"asked to stop: saving step {step}; not saved yet", file=sys.stderr, flush=True)
            record = self._record(step, result, seconds)
            validation = None if stopped and step < steps else self._validation(step)
            if validation:
                record |= {"validation_loss": validation.loss, "validation_bits_per_byte": validation.bits_per_byte}
            for sink in self.sinks:
                sink.write(record)
            if self.replication:
                self.replication.after_step(step)
            if every and step % every == 0 and step < steps and not stopped:
                self.checkpoints.save(step)
        if not self._is_stored(step):
            self.checkpoints.save_last(step)
        if stopped and self.sinks:
            print(f"saved step {step}", file=sys.stderr, flush=True)
        return {**record, **self._average(), "ended": "done" if step >= steps else "stopped", "step": step, **self._saved()}

    def _is_stored(self, step: int) -> bool:
        """Whether a checkpoint holds the state after `step` steps; a run that goes on from memory may begin at its last step."""
        newest = self.checkpoints.newest
        return newest is not None and step_of(newest) == step

    def _saved(self) -> dict[str, Any]:
        saves = self.checkpoints
        return {"checkpoint": str(saves.newest), "checkpoint_seconds": saves.seconds, "checkpoints_failed": saves.failed}

    def _timed_step(self, step: int) -> tuple[StepResult, float]:
        started = time.perf_counter()
        result = train_step(self.parts, step, self.stop, self.checkpoints.status)
        seconds = time.perf_counter() - started
        self.checkpoints.settle(result.saving)
        self._give_up_if_diverged(step, result)
        if step > 0:  # the first step of all pays for warming up
            self._busy_seconds += seconds
            self._steps_done += 1
        return result, seconds

    def _record(self, step: int, result: StepResult, seconds: float) -> dict[str, Any]:
        tokens = self._tokens_per_step
        record = {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": step * tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "mfu": tokens * self.seconds_per_token_at_ceiling / seconds,
            **self.checkpoints.record(),
        }
        if self.parts.recipe.model.moe.experts:
            record["balance_loss"] = result.balance_loss
        if self.parts.scaler.enabled:
            record |= {"loss_scale": self.parts.scaler.scale, "discarded": not result.committed}
        return record

    @property
    def _tokens_per_step(self) -> int:
        return self.parts.recipe.data.global_batch * self.parts.recipe.data.sequence_length

    def _average(self) -> dict[str, float]:
        """Speed over this process's steps, the run's first one left out."""
        if not self._steps_done:
            return {}
        seconds = self._busy_seconds / self._steps_done
        return {
            "tokens_per_second": self._tokens_per_step / seconds,
            "mfu": self._tokens_per_step * self.seconds_per_token_at_ceiling / seconds,
        }

    def _validation(self, step: int) -> Validation | None:
        train = self.parts.recipe.train
        due = step == train.steps or (train.validate_every and step % train.validate_every == 0)
        if not due:
            return None
        self.parts.mesh.monitor.at("validate")
        return validate(self.parts)

    def _give_up_if_diverged(self, step: int, result: StepResult) -> None:
        self._discarded = 0 if result.committed else self._discarded + 1
        allowed = _MOST_DISCARDED if self.parts.scaler.enabled else 0
        if self._discarded > allowed:
            self.checkpoints.finish()
            raise DivergedError(
                f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; the step was discarded. Lower optim.lr "
                f"or raise optim.warmup_steps, and go on from the last checkpoint with checkpoint.resume=true"
            )
