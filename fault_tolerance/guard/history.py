"""What the guard remembers from step to step; part of a run's saved state, so that a resumed run judges alike. Free of torch."""

import math
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bagualu.fault_tolerance.config import GuardConfig
from bagualu.fault_tolerance.guard.spike import History
from bagualu.fault_tolerance.guard.verdict import Cause, GuardAction, GuardDecision


@dataclass
class Counts:
    """Events since the run began."""

    skipped: int = 0
    """Steps left out because of their own figures, float16 overflows among them, and those whose samples were deferred."""
    computed_again: int = 0
    """Steps with something wrong that were computed more than once."""
    rolled_back: int = 0


@dataclass
class Memory:
    config: GuardConfig = field(repr=False, compare=False)
    losses: History
    norms: History
    left_out: dict[int, str] = field(default_factory=dict)
    """Steps (from 1) whose samples are not learnt from, and why."""
    deferred: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Steps (from 1) whose samples are learnt from later, with their loss and gradient norm."""
    setbacks: int = 0
    """Steps left out, deferred or taken back since the run last got further than it had ever been."""
    furthest: int = 0
    """The last step (from 1) that something was wrong with."""
    hard_row: int = 0
    """Steps in a row, up to now, that were hard."""
    diverged_row: int = 0
    """Steps in a row, up to now, at which samples that the run had learnt looked wrong too."""
    newest: tuple[int, float, float] | None = None
    """The newest step (from 1) that was committed, its loss and gradient norm."""
    overflows: int = 0
    """Steps left out for a float16 overflow."""
    counts: Counts = field(default_factory=Counts)

    @staticmethod
    def empty(config: GuardConfig) -> "Memory":
        left_out = dict.fromkeys(config.leave_out, "guard.leave_out")
        return Memory(config, History(config.spike_window), History(config.spike_window), left_out)

    def spike(self, step: int, loss: float, norm: float) -> Cause | None:
        """Whether the figures of `step` (from 1) stand out from those of the steps before."""
        if self.norms.stands_out(norm, self.config.spike_factor, step, self.hard_row):
            return Cause.NORM
        return Cause.LOSS if self.losses.stands_out(loss, self.config.loss_spike_factor, step, self.hard_row) else None

    def diverged(self, step: int, loss: float, norm: float, scale_can_fall: bool = False) -> bool:
        """Whether the weights at `step` (from 1) are wrong. `loss` and `norm` are those of the samples of the newest committed
        step, computed again. `scale_can_fall`: a norm that is not finite may be an overflow of float16, and says nothing."""
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
        """The step whose samples, deferred before, are to be learnt from at `step` (from 1): because samples like them are usual by
        now, or after a quarter of `guard.spike_window` steps, or because few steps are left before `last`, the run's last step."""
        ending = last is not None and last - step < len(self.deferred)
        for old, figures in sorted(self.deferred.items()):
            if ending or step - old > max(4, self.config.spike_window // 4) or not self.spike(step, *figures):
                return old
        return None

    def strongest(self) -> float:
        """The gradient norm from which on a step's norm is a spike, but for the scatter; infinite for none."""
        values = self.norms.values
        return self.config.spike_factor * median(values) if values and self.config.spike_factor else float("inf")

    def learn(self, step: int, loss: float, norm: float, verdict: GuardDecision) -> None:
        """Step `step` (from 1) has ended with `verdict`."""
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
        if verdict.cause is Cause.OVERFLOW:  # ends by itself: the loss scale falls with every one
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
        """The samples of `step`, deferred before, have been computed again at step `now` (from 1), with `verdict`."""
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
                self.furthest = max(self.furthest, now)  # else the steps up to there would make it look like the first time
            self.setbacks += 1

    def leave_out(self, first: int, last: int, why: str) -> None:
        """From now on steps first .. last (from 1) are left out."""
        for step in range(first, last + 1):
            self.left_out.setdefault(step, why)

    def left_out_steps(self, step: int) -> int:
        """How many of the steps up to `step` have not been learnt from."""
        return sum(old <= step for old in (*self.left_out, *self.deferred)) + self.overflows

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "losses": self.losses.values,
            "norms": self.norms.values,
            "hard_losses": [list(one) for one in self.losses.hard],
            "hard_norms": [list(one) for one in self.norms.hard],
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
        """What a person wants to know at the end of a run."""
        return {**asdict(self.counts), "skipped_steps": sorted({*self.left_out, *self.deferred})}

    @staticmethod
    def is_one(saved: Any) -> bool:
        """Whether `saved` is what `as_json` gives, or gave before it knew of samples that are deferred."""
        try:
            memory = Memory.empty(GuardConfig())
            memory.load(saved)
            figures = [*saved["losses"], *saved["norms"], *(one for _, one in [*memory.losses.hard, *memory.norms.hard])]
            numbers = [memory.setbacks, memory.furthest, memory.hard_row, memory.diverged_row, memory.overflows]
            return all(type(one) is float and one > 0 for one in figures) and all(type(one) is int for one in numbers)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return False

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds. What the recipe leaves out stays left out."""
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
        """The run has gone back to a checkpoint: what `other` knows to have happened since is not forgotten."""
        self.left_out |= other.left_out
        self.deferred = {step: figures for step, figures in self.deferred.items() if step not in self.left_out}
        self.setbacks, self.furthest, self.counts = other.setbacks, other.furthest, other.counts

    def _note(self, step: int, loss: float, norm: float) -> None:
        """Which of the figures are hard."""
        hard_loss = self.losses.is_hard(loss, self.config.loss_spike_factor)
        hard_norm = self.norms.is_hard(norm, self.config.spike_factor)
        if hard_loss:
            self.losses.add_hard(step, loss)
        if hard_norm:
            self.norms.add_hard(step, norm)
        self.hard_row = self.hard_row + 1 if hard_loss or hard_norm else 0
        self.diverged_row = 0
