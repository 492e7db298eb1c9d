"""The guard's memory between steps. It is saved in checkpoints, so that a resumed run makes the same decisions."""

import math
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bagualu.fault_tolerance.config import GuardConfig
from bagualu.fault_tolerance.guard.spike import History
from bagualu.fault_tolerance.guard.verdict import Cause, GuardAction, GuardDecision


@dataclass
class Counts:
    """Numbers of events since the run began."""

    skipped: int = 0
    """Steps without an update: after a float16 overflow, left out for good, or with their samples deferred."""
    computed_again: int = 0
    """Steps that were computed more than once because something was wrong."""
    rolled_back: int = 0


@dataclass
class Memory:
    """The guard's state: the history of losses and gradient norms, and which steps were left out. Steps are counted from 1."""

    config: GuardConfig = field(repr=False, compare=False)
    losses: History
    norms: History
    left_out: dict[int, str] = field(default_factory=dict)
    """Steps whose samples are never trained on, each with the reason."""
    deferred: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Steps whose samples are trained on later, each with the (loss, gradient norm) that made it a spike."""
    setbacks: int = 0
    """Number of steps left out, deferred or rolled back since the last commit of a step that was later than `furthest` at that
    time."""
    furthest: int = 0
    """The last step in which something was wrong, float16 overflows aside."""
    hard_row: int = 0
    """How many of the latest steps in a row were hard: loss or gradient norm far above the usual values (spike.py)."""
    diverged_row: int = 0
    """How many steps were deferred with the cause DIVERGED since a step was last committed or deferred for another cause."""
    newest: tuple[int, float, float] | None = None
    """(step, loss, gradient norm) of the newest committed step; None if no step is committed yet."""
    overflows: int = 0
    """Number of steps left out because of a float16 overflow."""
    counts: Counts = field(default_factory=Counts)

    @staticmethod
    def empty(config: GuardConfig) -> "Memory":
        """Returns the memory of a run that has not begun."""
        left_out = dict.fromkeys(config.leave_out, "guard.leave_out")
        return Memory(config, History(config.spike_window), History(config.spike_window), left_out)

    def spike(self, step: int, loss: float, norm: float) -> Cause | None:
        """Returns Cause.NORM if `norm` of `step` is a spike compared with the steps before, else Cause.LOSS if `loss` is, else
        None."""
        if self.norms.stands_out(norm, self.config.spike_factor, step, self.hard_row):
            return Cause.NORM
        return Cause.LOSS if self.losses.stands_out(loss, self.config.loss_spike_factor, step, self.hard_row) else None

    def diverged(self, step: int, loss: float, norm: float, scale_can_fall: bool = False) -> bool:
        """Returns whether the weights at `step` (from 1) are wrong.

        `loss` and `norm` are those of the newest committed step's samples, computed again; the weights are wrong if they are a
        spike. With `scale_can_fall`, a non-finite norm may be a float16 overflow, which shows nothing about the weights.
        """
        assert self.newest is not None
        _, loss_then, norm_then = self.newest
        if not math.isfinite(norm) and math.isfinite(loss) and scale_can_fall:
            return False
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return True
        factors = max(1.0, self.config.loss_spike_factor), max(1.0, self.config.spike_factor)
        grown = loss > factors[0] * loss_then or norm > factors[1] * norm_then
        return grown and self.spike(step, loss, norm) is not None

    def due(self, step: int, last: int | None = None) -> int | None:
        """Returns the first step whose deferred samples should be trained on before those of `step` (from 1); None if no step's
        should.

        Deferred samples are due when their loss and norm are no longer a spike, after a quarter of guard.spike_window steps, or if
        the steps that are left up to `last`, the run's last step, are needed for deferred samples.
        """
        ending = last is not None and last - step < len(self.deferred)
        for old, figures in sorted(self.deferred.items()):
            if ending or step - old > max(4, self.config.spike_window // 4) or not self.spike(step, *figures):
                return old
        return None

    def strongest(self) -> float:
        """Returns guard.spike_factor times the median gradient norm; infinite if that factor is 0 or there are no norms yet."""
        values = self.norms.values
        return self.config.spike_factor * median(values) if values and self.config.spike_factor else float("inf")

    def learn(self, step: int, loss: float, norm: float, verdict: GuardDecision) -> None:
        """Records the decision about `step` and its own samples; `loss` and `norm` are those of its newest attempt."""
        self.counts.computed_again += verdict.attempts > 1 and verdict.cause is not None
        if verdict.action is GuardAction.COMMIT or (verdict.deferred and verdict.cause is not Cause.DIVERGED):
            self._note(step, loss, norm)
        if verdict.action is GuardAction.COMMIT:
            self.losses.add(loss)
            self.norms.add(norm)
            self.newest = step, loss, norm
            if step > self.furthest:
                self.setbacks = 0
            return
        self.counts.skipped += verdict.action is GuardAction.SKIP
        self.counts.rolled_back += verdict.action is GuardAction.ROLLBACK
        if verdict.cause is Cause.OVERFLOW:  # not a setback: each overflow lowers the loss scale, until they end
            self.overflows += 1
            return
        self.setbacks += 1
        self.furthest = max(self.furthest, step)
        if verdict.deferred:
            self.deferred[step] = loss, norm
            self.diverged_row += verdict.cause is Cause.DIVERGED
        elif verdict.action is GuardAction.SKIP:
            self.left_out[step] = str(verdict.cause)

    def learn_late(self, step: int, loss: float, norm: float, verdict: GuardDecision, now: int) -> None:
        """Records the decision about the deferred samples of `step`, which were computed again at step `now`."""
        if verdict.action is GuardAction.COMMIT:
            del self.deferred[step]
            self.losses.add(loss)
            self.norms.add(norm)
        elif verdict.cause is not Cause.OVERFLOW:
            if verdict.action is GuardAction.SKIP:
                del self.deferred[step]
                self.left_out[step] = str(verdict.cause)
            if verdict.action is GuardAction.ROLLBACK:
                self.counts.rolled_back += 1
                self.furthest = max(self.furthest, now)  # so that the repeated steps up to `now` do not reset `setbacks`
            self.setbacks += 1

    def leave_out(self, first: int, last: int, why: str) -> None:
        """Records that the samples of steps `first` to `last` (inclusive) are left out, with the reason `why`."""
        for step in range(first, last + 1):
            self.left_out.setdefault(step, why)

    def left_out_steps(self, step: int) -> int:
        """Returns how many steps up to `step` were not trained on (so far): left out, deferred, or skipped after a float16
        overflow."""
        return sum(old <= step for old in (*self.left_out, *self.deferred)) + self.overflows

    def as_json(self) -> dict[str, Any]:
        """Returns the memory as plain JSON, to be stored in checkpoints; see `load`."""
        return {
            "losses": self.losses.values,
            "norms": self.norms.values,
            "hard_losses": [list(pair) for pair in self.losses.hard],
            "hard_norms": [list(pair) for pair in self.norms.hard],
            "skipped_steps": {str(step): why for step, why in sorted(self.left_out.items())},
            "deferred_steps": {str(step): list(figures) for step, figures in sorted(self.deferred.items())},
            "setbacks": self.setbacks,
            "furthest": self.furthest,
            "hard_row": self.hard_row,
            "diverged_row": self.diverged_row,
            "newest": list(self.newest or ()),
            "overflows": self.overflows,
            "counts": asdict(self.counts),
        }

    def summary(self) -> dict[str, Any]:
        """Returns the fields of `counts`, and as "skipped_steps" the sorted steps left out or still deferred, for the summary of a
        run."""
        return {**asdict(self.counts), "skipped_steps": sorted({*self.left_out, *self.deferred})}

    @staticmethod
    def is_one(saved: Any) -> bool:
        """Returns whether `load` accepts `saved`: a result of `as_json`, of this version or of an older version that did not defer
        samples."""
        try:
            memory = Memory.empty(GuardConfig())
            memory.load(saved)
            figures = [*saved["losses"], *saved["norms"], *(value for _, value in [*memory.losses.hard, *memory.norms.hard])]
            numbers = [memory.setbacks, memory.furthest, memory.hard_row, memory.diverged_row, memory.overflows]
            return all(type(value) is float and value > 0 for value in figures) and all(type(value) is int for value in numbers)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return False

    def load(self, saved: dict[str, Any]) -> None:
        """Replaces this memory by `saved`, a result of `as_json`. Steps in guard.leave_out of the recipe stay left out."""
        self.losses.load(saved["losses"], saved.get("hard_losses", ()))
        self.norms.load(saved["norms"], saved.get("hard_norms", ()))
        self.left_out |= {int(step): why for step, why in saved["skipped_steps"].items()}
        deferred = {int(step): (float(loss), float(norm)) for step, (loss, norm) in saved.get("deferred_steps", {}).items()}
        self.deferred = {step: figures for step, figures in deferred.items() if step not in self.left_out}
        self.setbacks, self.furthest = saved["setbacks"], saved["furthest"]
        self.hard_row, self.diverged_row = saved.get("hard_row", 0), saved.get("diverged_row", 0)
        self.overflows = saved.get("overflows", 0)
        newest = saved.get("newest")
        self.newest = (int(newest[0]), float(newest[1]), float(newest[2])) if newest else None
        self.counts = Counts(**saved["counts"])

    def keep(self, other: "Memory") -> None:
        """Takes over left-out steps, setbacks, `furthest` and counts from `other`, the memory before the run went back to a
        checkpoint. Call this on the memory loaded from that checkpoint."""
        self.left_out |= other.left_out
        self.deferred = {step: figures for step, figures in self.deferred.items() if step not in self.left_out}
        self.setbacks, self.furthest, self.counts = other.setbacks, other.furthest, other.counts

    def _note(self, step: int, loss: float, norm: float) -> None:
        """Records which of loss and norm of `step` were hard, and whether any was."""
        hard_loss = self.losses.is_hard(loss, self.config.loss_spike_factor)
        hard_norm = self.norms.is_hard(norm, self.config.spike_factor)
        if hard_loss:
            self.losses.add_hard(step, loss)
        if hard_norm:
            self.norms.add_hard(step, norm)
        self.hard_row = self.hard_row + 1 if hard_loss or hard_norm else 0
        self.diverged_row = 0
