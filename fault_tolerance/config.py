"""What a recipe says about checkpoints, steps that go wrong, going on after a failure, and slow ranks. Free of torch."""

from dataclasses import dataclass, field

from bagualu.comm.checks import refuse_unused, require_at_least
from bagualu.comm.errors import RecipeError

_LONGEST_PAUSE_SECONDS = 60.0


@dataclass
class CheckpointConfig:
    """`checkpoint.*` of a recipe."""

    every: int = 100
    """Steps between checkpoints; 0 saves only at the end or when asked to stop."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""
    replica_every: int = 0
    """Steps between copies of every rank's state in the memory of its node and, where there are several, another one; 0: none."""
    resume: bool = False
    """Go on from the newest checkpoint of the run directory; with none there, start from the beginning and say so."""
    asynchronous: bool = field(default=True, metadata={"key": "async"})
    """Write in the background while training goes on; takes host memory for one more copy of this rank's part."""
    timeout_seconds: float | None = None
    """Storage that has not taken a rank's part, or the commit, by then has failed; left out, half of comm.timeout_seconds."""

    def validate(self) -> None:
        if self.every < 0:
            raise RecipeError(f"checkpoint.every={self.every} must be 0 or more, e.g. checkpoint.every=100")
        require_at_least(0, "checkpoint", self, "replica_every")
        if self.keep < 1:
            raise RecipeError(f"checkpoint.keep={self.keep} must be at least 1, so that a run can be resumed")
        if self.timeout_seconds is not None and self.timeout_seconds <= 0:
            raise RecipeError(f"checkpoint.timeout_seconds={self.timeout_seconds} must be positive, or leave it out")


@dataclass
class RestartConfig:
    """`restart.*` of a recipe: what the launcher does when a rank is lost."""

    limit: int = 3
    """How often workers are started again after a failure, over the whole launch; 0: never."""
    backoff_seconds: float = 1.0
    """Pause before the first restart; every further one waits twice as long, at most a minute. In the same way before new tries to
    read checkpoints that cannot be read: four pauses."""
    same_step_limit: int = 2
    """A step that has failed this often, with nothing gained in between, ends the run (exit code 76)."""
    elastic: bool = False
    """Go on with fewer ranks and a smaller layout when some are lost for good; grow back when they return."""
    min_workers: int = 1
    """With restart.elastic=true: the fewest ranks worth going on with."""
    wait_seconds: int = 300
    """How long nodes wait for one another, at the start and after a loss; then the run goes on without those that are missing
    (restart.elastic=true) or fails."""
    hang_seconds: float = 300.0
    """A rank that shows no progress for so long, or waits so long for one that shows none, ends the run's processes; 0: never.
    At most three quarters of comm.timeout_seconds, whatever it says."""
    long_hang_seconds: float = 1800.0
    """The same where nothing can be seen for long: start, first step (compilation), validation, checkpoints read and written.
    No longer than restart.hang_seconds for a rank that another has waited for three quarters of comm.timeout_seconds."""

    def pause_seconds(self, number: int) -> float:
        """The pause before try `number` after the first (from 1)."""
        return min(_LONGEST_PAUSE_SECONDS, self.backoff_seconds * 2.0 ** min(number - 1, 30))

    def validate(self) -> None:
        require_at_least(0, "restart", self, "limit", "backoff_seconds")
        require_at_least(1, "restart", self, "same_step_limit", "min_workers", "wait_seconds")
        require_at_least(0, "restart", self, "hang_seconds")
        require_at_least(self.hang_seconds, "restart", self, "long_hang_seconds")
        if not self.hang_seconds:
            refuse_unused("restart", self, ["long_hang_seconds"], "restart.hang_seconds=0")
        if not self.elastic:
            refuse_unused("restart", self, ["min_workers"], "restart.elastic=false")


POLICIES = ("retry", "skip", "rollback", "stop")


@dataclass
class GuardConfig:
    """`guard.*` of a recipe: what becomes of a step whose figures are wrong, or of hardware that computes wrongly.

    retry: compute it again from the same weights and samples. Fine this time: it was the hardware. The same again: skip.
    skip: no update, the samples count as used. rollback: back to a checkpoint, and the samples that led here are left out.
    stop: the run ends.
    """

    on_nonfinite: str = "retry"
    """retry | skip | rollback | stop: a loss or gradient that is not finite. (float16's overflows lower the loss scale instead.)"""
    on_spike: str = "retry"
    """retry | skip | rollback | stop: a loss or gradient norm far above those of the steps before."""
    on_disagreement: str = "retry"
    """retry | rollback | stop: ranks that should hold or compute the same do not. retry repairs what it can from another rank
    and rolls back where nobody holds the same; nothing is left out."""
    spike_factor: float = 10.0
    """How many times the median a gradient norm must be to count as a spike, beyond the usual scatter; 0 looks for none."""
    loss_spike_factor: float = 2.0
    """The same for the loss."""
    spike_window: int = 64
    """Steps before this one that say what is usual."""
    rollback_window: int = 1
    """Steps, up to the bad one, whose samples are left out after a rollback."""
    limit: int = 5
    """Steps skipped or taken back in a row before the run stops."""
    check_every: int = 10
    """Steps between checks of weights and optimizer state for damage, besides that after every checkpoint; 0 never checks.
    Optimizer state that no other rank holds is watched from the end of the step before to the check: in 1 of so many steps."""
    audit_every: int = 0
    """Steps between audits, whose gradients are computed twice and compared: an N-th more time for every N-th step; 0 never."""
    leave_out: list[int] = field(default_factory=list)
    """Steps, from 1, whose samples are not to be learnt from."""

    @property
    def compares(self) -> bool:
        """Whether attempts at a step are compared bit by bit."""
        return self.audit_every > 0 or "retry" in (self.on_nonfinite, self.on_spike)

    def validate(self, saves: bool, repeatable: bool) -> None:
        """`saves`: whether the run makes checkpoints as it goes. `repeatable`: whether it computes the same bits twice."""
        if self.audit_every and not repeatable:
            raise RecipeError(f"guard.audit_every={self.audit_every} compares two computations bit by bit, which differ with "
                              "train.deterministic=false; give guard.audit_every=0 or train.deterministic=true")  # fmt: skip
        for name in ("on_nonfinite", "on_spike", "on_disagreement"):
            policies = [one for one in POLICIES if (name, one) != ("on_disagreement", "skip")]
            policy = getattr(self, name)
            if policy not in policies:
                why = ": to skip a step does not repair what is damaged" if policy == "skip" else " is unknown"
                raise RecipeError(f"guard.{name}={policy}{why}; give one of {', '.join(policies)}")
            if policy == "rollback" and not saves:
                raise RecipeError(f"guard.{name}=rollback needs checkpoints to go back to; give checkpoint.every, "
                                  f"or guard.{name}={'skip' if 'skip' in policies else 'stop'}")  # fmt: skip
        for name in ("spike_factor", "loss_spike_factor"):
            if getattr(self, name) != 0 and getattr(self, name) <= 1:
                raise RecipeError(f"guard.{name}={getattr(self, name)} must be above 1, or 0 to look for no spikes")
        for name, least in (("spike_window", 4), ("rollback_window", 1), ("limit", 0), ("check_every", 0), ("audit_every", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"guard.{name}={getattr(self, name)} must be at least {least}")
        if any(step < 1 for step in self.leave_out):
            raise RecipeError(f"guard.leave_out={self.leave_out} counts steps from 1, as metrics.jsonl does; e.g. [7,8]")


@dataclass
class StragglerConfig:
    """`straggler.*` of a recipe."""

    ratio: float = 1.5
    """A rank is slow when its own work takes this many times as long as its peers'; 0: nobody looks."""
    window_seconds: float = 10.0
    """Time over which work is summed up (5 to 1000 steps); 4 slow windows of the last 5 flag a rank."""

    def validate(self) -> None:
        if self.ratio and self.ratio <= 1:
            raise RecipeError(f"straggler.ratio={self.ratio} must be above 1, or 0 to turn it off, e.g. straggler.ratio=1.5")
        if self.window_seconds <= 0:
            raise RecipeError(f"straggler.window_seconds={self.window_seconds} must be positive, e.g. straggler.window_seconds=10")
        if not self.ratio:
            refuse_unused("straggler", self, ["window_seconds"], "straggler.ratio=0")
