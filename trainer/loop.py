"""The loop over steps: it trains, records, validates, saves, and stops when asked."""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from bagualu.comm.monitor import Phase
from bagualu.fault_tolerance.checkpoint.layout.format import step_of
from bagualu.fault_tolerance.guard.verdict import GuardAction
from bagualu.fault_tolerance.straggler import Stragglers
from bagualu.parallel import product_shapes as shapes
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.data.ahead import waiting
from bagualu.trainer.evaluate import Validation, validate
from bagualu.trainer.output.metric_writers import Sink
from bagualu.trainer.output.pipeline_timeline import PipelineRecorder
from bagualu.trainer.process.failure import GuardError
from bagualu.trainer.rebalance import Rebalancer
from bagualu.trainer.recovery.replication import Replication
from bagualu.trainer.recovery.rollback import roll_back
from bagualu.trainer.recovery.saving import Checkpoints
from bagualu.trainer.sample import show_sample
from bagualu.trainer.simulation.step_clock import StepClock
from bagualu.trainer.step import StepResult, train_step

log = logging.getLogger(__name__)


@dataclass
class Loop:
    """Runs the steps of a run. `stop` returns whether this rank was asked to stop. `seconds_per_token_at_ceiling`: the seconds that
    a token's FLOPs would take if all ranks together computed at their matmul ceiling, for MFU."""

    state: TrainerState
    sinks: Sequence[Sink]
    stop: Callable[[], bool]
    seconds_per_token_at_ceiling: float
    checkpoints: Checkpoints
    stragglers: Stragglers
    replication: Replication | None = None
    rebalancer: Rebalancer | None = None
    counting: Callable[[], AbstractContextManager[None]] = nullcontext
    """Makes the context in which a step is computed."""
    clock: StepClock | None = None
    """The virtual time of the steps on a described cluster; None without one."""
    _due: bool = False
    """Whether a periodic checkpoint is due; it is saved after the next step whose update is applied."""
    _damaged: list[dict[str, Any]] = field(default_factory=list)
    """Checkpoints that rollbacks could not use, as in `Resumed.damaged`."""
    _busy_seconds: float = 0.0
    _waited: float | None = None
    """The seconds of the latest step in which this rank waited for samples; None if that is not known."""
    _data_seconds: float = 0.0
    """The part of `_busy_seconds` in which rank 0 waited for samples."""
    _shapes: int = field(default_factory=shapes.met)
    """The number of shapes of products that this process had met before the latest step (parallel/product_shapes.py)."""
    _new_shapes: int = 0
    """How many the latest step met for the first time."""
    _steps_done: int = 0

    def run(self, first_step: int) -> dict[str, Any]:
        """Runs the steps after the first `first_step` until train.steps are done or any rank is asked to stop, and saves the final
        state. Returns summary fields: how the run ended, the metrics of its last step and average speed. Raises GuardError."""
        steps, every = self.state.recipe.train.steps, self.state.recipe.checkpoint.every
        step, stopped = first_step, False
        record: dict[str, Any] = {}
        timeline = PipelineRecorder(self.state, first_step)
        while step < steps and not stopped:
            timeline.before_step(step)
            self._shapes = shapes.met()  # samples and validations have met some
            started = time.perf_counter()
            with self.counting(), self.clock.timing() if self.clock else nullcontext():
                result = train_step(self.state, step, self.stop, self.checkpoints.status)
            seconds = time.perf_counter() - started
            self._after_step(step, result, seconds)
            timeline.after_step(step, computed=result.verdict.attempts > 0)
            if result.verdict.action is GuardAction.ROLLBACK:
                step = self._go_back(step, result)
                continue
            step += 1
            stopped = result.stop
            if stopped and self.sinks:  # on rank 0, which may not be the rank that was asked
                print(f"asked to stop: saving step {step}; not saved yet", file=sys.stderr, flush=True)
            record = self._record(step, result, seconds) | self._slow_ranks(step, seconds) | self._rebalance(step, result)
            validation = None if stopped and step < steps else self._validation(step)
            if validation:
                record |= {"validation_loss": validation.loss, "validation_bits_per_byte": validation.bits_per_byte}
                record |= {"validation_losses": validation.losses} if validation.losses else {}
                if loads := validation.expert_loads:
                    record |= {"expert_loads": {str(layer): counts for layer, counts in loads.items()},
                               "expert_imbalance": validation.expert_imbalance}  # fmt: skip
            self.checkpoints.still_ours()
            for sink in self.sinks:
                sink.write(record)
            if self._samples_after(step, stopped):
                show_sample(self.state, step)
            if self.replication and result.committed:  # else the state itself may be damaged
                self.replication.after_step(step)
            self._due |= bool(every) and step % every == 0
            if self._due and result.committed and step < steps and not stopped:
                self.checkpoints.save(step)
                self._due = False
        if not self._is_stored(step):
            self.checkpoints.save_last(step)
        if stopped and self.sinks:
            print(f"saved step {step}", file=sys.stderr, flush=True)
        if self.state.mesh.at("world") == 0 and (remark := waiting(self._data_seconds, self._busy_seconds, self.state.recipe.data)):
            print(remark, file=sys.stderr, flush=True)
        ended = {"ended": "done" if step >= steps else "stopped", "step": step}
        memory = self.state.guard.memory
        watched = {"guard": memory.summary(), "left_out_steps": memory.left_out_steps(step), "stragglers": self.stragglers.ever()}
        return {**record, **self._average(), **ended, **self._saved(), **watched, "damaged": self._damaged}

    def _is_stored(self, step: int) -> bool:
        """Whether the newest checkpoint holds the state after `step` steps, so that no final save is needed. A run without a step
        left to do may still need that save, if it resumed from a replica in memory."""
        newest = self.checkpoints.newest
        return newest is not None and step_of(newest) == step

    def _saved(self) -> dict[str, Any]:
        saves = self.checkpoints
        return {"checkpoint": str(saves.newest), "checkpoint_seconds": saves.seconds, "checkpoints_failed": saves.failed}

    def _after_step(self, step: int, result: StepResult, seconds: float) -> None:
        """Advances the save in progress, logs the guard's decisions on rank 0, and adds the seconds of step `step` (from 0) to the
        total for the average speed, except for the run's first step. Raises GuardError if the guard ends the run."""
        self.checkpoints.settle(result.saving)
        for verdict in filter(None, (result.late_verdict, result.verdict)):
            if verdict.text and self.state.mesh.at("world") == 0:
                log.warning("%s", verdict.text)
        if result.verdict.action is GuardAction.STOP:
            self.checkpoints.finish()
            raise GuardError(result.verdict.text)
        self._waited = None if self.state.ahead is None else self.state.ahead.waited()
        self._new_shapes = shapes.met() - self._shapes
        if step > 0:  # the run's first step includes warm-up
            self._busy_seconds += seconds
            self._data_seconds += self._waited or 0.0
            self._steps_done += 1

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
            "new_shapes": self._new_shapes,
            **self.checkpoints.record(),
        }
        if self._waited is not None:
            record["data_seconds"] = self._waited
        if self.clock is not None:
            record["virtual_step_seconds"] = self.clock.step_seconds
        if self.state.recipe.model.moe.experts:
            record["balance_loss"] = result.balance_loss
        if self.state.scaler.enabled:
            record["loss_scale"] = self.state.scaler.scale
        return record | self._trouble(step, result)

    def _trouble(self, step: int, result: StepResult) -> dict[str, Any]:
        """Returns the extra metrics fields for step `step` (from 1): whether and why it was left out, discarded or deferred, how
        often it was computed if not once, and which step's deferred samples it trained on; {} for an ordinary step."""
        verdict, left_out = result.verdict, self.state.guard.leaves_out(step)
        record: dict[str, Any] = {} if result.committed else {"discarded": True}
        if cause := verdict.cause or left_out:
            record["cause"] = str(cause)
        if verdict.ranks:
            record["ranks"] = list(verdict.ranks)
        if verdict.deferred:
            record["deferred"] = True
        if result.late_verdict and result.late_verdict.action is GuardAction.COMMIT:
            record["deferred_step"] = result.late
        return record if verdict.attempts == 1 else record | {"attempts": verdict.attempts}

    def _go_back(self, step: int, result: StepResult) -> int:
        """Undoes step `step` (from 0) and the steps before it back to a checkpoint; returns the number of steps that remain
        done."""
        self.checkpoints.rest()
        resumed = roll_back(self.state, step + 1, result.verdict, self.stop)
        done, self.checkpoints.newest = resumed.step, resumed.checkpoint
        self._damaged += resumed.damaged
        if self.replication:
            self.replication.go_back(done)
        if self.rebalancer:
            self.rebalancer.go_back()
        self._due = False
        for sink in self.sinks:
            sink.rewind(done)
        return done

    def _slow_ranks(self, step: int, seconds: float) -> dict[str, Any]:
        for change in self.stragglers.after_step(step, seconds):
            if self.state.mesh.at("world") == 0:
                print(f"step {step}: {change}", file=sys.stderr, flush=True)
        return {"stragglers": slow} if (slow := self.stragglers.now()) else {}

    def _rebalance(self, step: int, result: StepResult) -> dict[str, Any]:
        """Lets layers move if that makes steps shorter; returns the metrics fields about a move, also a failed one; {} without a
        move."""
        useful = result.verdict.attempts > 0 and step < self.state.recipe.train.steps
        moved = self.rebalancer.after_step(step) if self.rebalancer and useful else None
        if moved is None:
            return {}
        if self.state.mesh.at("world") == 0:
            print(f"step {step}: {moved}", file=sys.stderr, flush=True)
        return {"layers_of_stages": moved.before if moved.failed else moved.after, "move_seconds": moved.seconds}

    @property
    def _tokens_per_step(self) -> int:
        return self.state.recipe.data.global_batch * self.state.recipe.data.sequence_length

    def _average(self) -> dict[str, float]:
        """Returns the average speed and MFU over this process's steps, without the run's first step; {} if there are no such
        steps."""
        if not self._steps_done:
            return {}
        seconds = self._busy_seconds / self._steps_done
        return {
            "data_seconds": self._data_seconds / self._steps_done,
            "tokens_per_second": self._tokens_per_step / seconds,
            "mfu": self._tokens_per_step * self.seconds_per_token_at_ceiling / seconds,
        }

    def _samples_after(self, step: int, stopped: bool) -> bool:
        steps, every = self.state.recipe.train.steps, self.state.recipe.train.sample_every
        return every > 0 and (step == steps or (step % every == 0 and not stopped))

    def _validation(self, step: int) -> Validation | None:
        train = self.state.recipe.train
        due = step == train.steps or (train.validate_every and step % train.validate_every == 0)
        if not due:
            return None
        self.state.mesh.monitor.at(Phase.VALIDATE)
        return validate(self.state)
