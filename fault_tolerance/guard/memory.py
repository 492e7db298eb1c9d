"""What the guard remembers from step to step; part of a run's saved state, so that a resumed run judges alike. Free of torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

from bagualu.fault_tolerance.config import GuardConfig
from bagualu.fault_tolerance.guard.spike import History
from bagualu.fault_tolerance.guard.verdict import Action, Cause, Verdict


@dataclass
class Counts:
    """Events since the run began."""

    skipped: int = 0
    """Steps left out because of their own figures, float16 overflows among them."""
    computed_again: int = 0
    """Steps with something wrong that were computed more than once."""
    rolled_back: int = 0


@dataclass
class Memory:
    losses: History
    norms: History
    left_out: dict[int, str] = field(default_factory=dict)
    """Steps (from 1) whose samples are not learnt from, and why."""
    setbacks: int = 0
    """Steps left out or taken back since the run last got further than it had ever been."""
    furthest: int = 0
    """The last step (from 1) that something was wrong with."""
    counts: Counts = field(default_factory=Counts)

    @staticmethod
    def empty(config: GuardConfig) -> "Memory":
        left_out = dict.fromkeys(config.leave_out, "guard.leave_out")
        return Memory(History(config.spike_window), History(config.spike_window), left_out)

    def spike(self, loss: float, norm: float, config: GuardConfig) -> Cause | None:
        """Whether these figures stand out from those of the committed steps."""
        if self.norms.stands_out(norm, config.spike_factor):
            return Cause.NORM
        return Cause.LOSS if self.losses.stands_out(loss, config.loss_spike_factor) else None

    def learn(self, step: int, loss: float, norm: float, verdict: Verdict) -> None:
        """Step `step` (from 1) has ended with `verdict`."""
        self.counts.computed_again += verdict.attempts > 1 and verdict.cause is not None
        if verdict.action is Action.COMMIT:
            self.losses.add(loss)
            self.norms.add(norm)
            if step > self.furthest:
                self.setbacks = 0
            return
        self.counts.skipped += verdict.action is Action.SKIP
        self.counts.rolled_back += verdict.action is Action.ROLLBACK
        if verdict.cause is Cause.OVERFLOW:  # ends by itself: the loss scale falls with every one
            return
        self.setbacks += 1
        self.furthest = max(self.furthest, step)
        if verdict.action is Action.SKIP:
            self.left_out[step] = str(verdict.cause)

    def leave_out(self, first: int, last: int, why: str) -> None:
        """From now on steps first .. last (from 1) are left out."""
        for step in range(first, last + 1):
            self.left_out.setdefault(step, why)

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "losses": self.losses.values,
            "norms": self.norms.values,
            "skipped_steps": {str(step): why for step, why in sorted(self.left_out.items())},
            "setbacks": self.setbacks,
            "furthest": self.furthest,
            "counts": asdict(self.counts),
        }

    def summary(self) -> dict[str, Any]:
        """What a person wants to know at the end of a run."""
        return {**asdict(self.counts), "skipped_steps": sorted(self.left_out)}

    @staticmethod
    def is_one(saved: Any) -> bool:
        """Whether `saved` is what `as_json` gives."""
        try:
            Memory.empty(GuardConfig()).load(saved)
            figures = [*saved["losses"], *saved["norms"]]
            return all(type(one) is float and one > 0 for one in figures) and type(saved["setbacks"]) is int
        except (KeyError, TypeError, ValueError, AttributeError):
            return False

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds. What the recipe leaves out stays left out."""
        self.losses.load(saved["losses"])
        self.norms.load(saved["norms"])
        self.left_out |= {int(step): why for step, why in saved["skipped_steps"].items()}
        self.setbacks, self.furthest = saved["setbacks"], saved["furthest"]
        self.counts = Counts(**saved["counts"])

    def keep(self, other: "Memory") -> None:
        """The run has gone back to a checkpoint: what `other` knows to have happened since is not forgotten."""
        self.left_out |= other.left_out
        self.setbacks, self.furthest, self.counts = other.setbacks, other.furthest, other.counts
