"""The settings of a recipe for checkpoints, restarts, the guard and slow ranks."""

from dataclasses import dataclass, field

from bagualu.comm.checks import refuse_unused, require_at_least
from bagualu.comm.errors import RecipeError

_LONGEST_PAUSE_SECONDS = 60.0


@dataclass
class CheckpointConfig:
    """`checkpoint.*` of a recipe."""

    every: int = 100
    """Steps between checkpoints; 0: checkpoints are saved only at the end of the run or when the run is asked to stop."""
    keep: int = 2
    """The number of newest undamaged checkpoints that stay on disk; older checkpoints are removed."""
    replica_every: int = 0
    """Steps between replicas: copies of every rank's state in the memory of its own node and, on several nodes, of another node; 0:
    no replicas."""
    resume: bool = False
    """Whether to resume from the newest checkpoint in the run directory. If there is no checkpoint, the run starts from the
    beginning and logs that."""
    asynchronous: bool = field(default=True, metadata={"key": "async"})
    """Whether checkpoints are written in the background during training. This needs host memory for a copy of the rank's part."""
    timeout_seconds: float | None = None
    """Seconds that a rank may take to write its part of a save, or rank 0 to commit the save, before the save fails. Default: half
    of comm.timeout_seconds."""

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
    """The most times that a launch restarts workers after failures; 0: never."""
    backoff_seconds: float = 1.0
    """Seconds of pause before the first restart. Every further pause is twice as long, but at most a minute; see
    restart.backoff_reset_seconds. If a start cannot read the checkpoints, four further attempts to read them follow after such
    pauses."""
    backoff_reset_seconds: float = 600.0
    """Seconds from a restart to the next failure after which pauses begin anew with restart.backoff_seconds. 10 minutes are what
    Kubernetes takes for containers. 0: all pauses are equal."""
    same_step_limit: int = 2
    """Number of failures at the same step, without progress in between, after which the run ends (exit code 76) or, with
    restart.elastic=true, goes on without the rank at fault if it was the same rank each time."""
    elastic: bool = False
    """Whether the run continues with fewer ranks and a smaller layout if ranks are lost for good, and grows when they return."""
    min_workers: int = 1
    """The fewest ranks with which the run continues, if restart.elastic=true."""
    wait_seconds: int = 300
    """Seconds that nodes wait for each other, at the start and after a node is lost. Then the run continues without the missing
    nodes (restart.elastic=true) or fails."""
    hang_seconds: float = 300.0
    """Seconds for which a rank makes no progress, or waits for such a rank, before the run's processes are ended; 0: never. If this
    value is greater than three quarters of comm.timeout_seconds, those three quarters apply."""
    long_hang_seconds: float = 1800.0
    """Seconds that take the place of restart.hang_seconds in phases that may take long without visible progress: start, first step
    (compilation), validation, reading and writing checkpoints. Once another rank has waited for three quarters of
    comm.timeout_seconds, restart.hang_seconds applies in these phases too."""

    def pause_seconds(self, number: int) -> float:
        """Returns the seconds of pause before restart `number`, or before further attempt `number` to read checkpoints, counted
        from 1."""
        return min(_LONGEST_PAUSE_SECONDS, self.backoff_seconds * 2.0 ** min(number - 1, 30))

    def validate(self) -> None:
        require_at_least(0, "restart", self, "limit", "backoff_seconds", "backoff_reset_seconds")
        require_at_least(1, "restart", self, "same_step_limit", "min_workers", "wait_seconds")
        require_at_least(0, "restart", self, "hang_seconds")
        require_at_least(self.hang_seconds, "restart", self, "long_hang_seconds")
        if not self.backoff_seconds:
            refuse_unused("restart", self, ["backoff_reset_seconds"], "restart.backoff_seconds=0")
        if not self.hang_seconds:
            refuse_unused("restart", self, ["long_hang_seconds"], "restart.hang_seconds=0")
        if not self.elastic:
            refuse_unused("restart", self, ["min_workers"], "restart.elastic=false")


POLICIES = ("retry", "skip", "rollback", "stop")


@dataclass
class GuardConfig:
    """`guard.*` of a recipe: what happens to a step with bad values, or on hardware that computes wrongly.

    retry: compute the step again from the same weights and samples. If it is good then, the hardware was at fault and the step is
    applied. If it is bad in the same way, there is no update; after a spike the samples are used some steps later, else never.
    skip: no update; the step's samples are not used again. rollback: go back to a checkpoint and leave out the samples that led
    here. stop: end the run.
    """

    on_nonfinite: str = "retry"
    """retry | skip | rollback | stop: for a loss or gradient that is not finite. (Overflows of float16 only lower the loss
    scale.)"""
    on_spike: str = "retry"
    """retry | skip | rollback | stop: for a loss or gradient norm far above those of the previous steps."""
    on_disagreement: str = "retry"
    """retry | rollback | stop: for ranks that should hold or compute the same but do not. retry repairs what it can from another
    rank and rolls back if no rank holds a copy; no samples are left out."""
    spike_factor: float = 10.0
    """A gradient norm this many times the usual value, and beyond the usual scatter of norms, is a spike; 0: no check for such
    spikes. The usual value is derived from the median of the window, its third largest value and earlier hard steps
    (docs/design/guard.md)."""
    loss_spike_factor: float = 2.0
    """A loss this many times the usual value, and beyond the usual scatter of losses, is a spike; 0: no check for such spikes."""
    spike_window: int = 64
    """The number of previous steps whose losses and gradient norms determine what is usual. Deferred samples are trained on after a
    quarter of as many steps at the latest."""
    rollback_window: int = 1
    """Number of steps whose samples are left out after a rollback: the bad step and those just before it."""
    limit: int = 5
    """The most steps in a row that may be skipped, deferred or rolled back (float16 overflows aside); the next such step ends the
    run."""
    check_every: int = 10
    """Steps between checks of weights and optimizer state for damage, in addition to the check after every checkpoint; 0: never.
    For optimizer state that no other rank holds, checksums are taken at the end of the previous step and compared at the check, so
    only damage in the step before a check is detected."""
    audit_every: int = 0
    """Steps between audits, in which gradients are computed twice and compared. Each audit costs one more computation of the
    gradients; 0: no audits."""
    leave_out: list[int] = field(default_factory=list)
    """Steps, from 1, whose samples are not used for training."""

    @property
    def compares(self) -> bool:
        """Whether the gradients of repeated attempts at a step are compared bit by bit."""
        return self.audit_every > 0 or "retry" in (self.on_nonfinite, self.on_spike)

    def validate(self, saves: bool, repeatable: bool) -> None:
        """Raises RecipeError for settings that cannot work. `saves` says whether the run saves checkpoints before its end,
        `repeatable` whether a repeated computation gives the same bits."""
        if self.audit_every and not repeatable:
            raise RecipeError(f"guard.audit_every={self.audit_every} compares two computations bit by bit, which differ with "
                              "train.deterministic=false; give guard.audit_every=0 or train.deterministic=true")  # fmt: skip
        for name in ("on_nonfinite", "on_spike", "on_disagreement"):
            policies = [policy for policy in POLICIES if (name, policy) != ("on_disagreement", "skip")]
            policy = getattr(self, name)
            if policy not in policies:
                why = ": skipping a step does not repair damage" if policy == "skip" else " is unknown"
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
    """A rank is slow in a window if its own work takes more than this many times as long as its peers' (their median); 0: no
    check."""
    window_seconds: float = 10.0
    """Approximate length, in seconds, of a window over which work is summed; a window has 5 to 1000 steps. A rank is flagged after
    4 slow windows among its last 5."""

    def validate(self) -> None:
        if self.ratio and self.ratio <= 1:
            raise RecipeError(f"straggler.ratio={self.ratio} must be above 1, or 0 to turn it off, e.g. straggler.ratio=1.5")
        if self.window_seconds <= 0:
            raise RecipeError(f"straggler.window_seconds={self.window_seconds} must be positive, e.g. straggler.window_seconds=10")
        if not self.ratio:
            refuse_unused("straggler", self, ["window_seconds"], "straggler.ratio=0")
