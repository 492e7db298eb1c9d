"""What a recipe says about checkpoints and about going on after a failure. Free of torch."""

from dataclasses import dataclass, field

from bagualu.comm.checks import refuse_unused, require_at_least
from bagualu.comm.errors import RecipeError


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
    """Pause before the first restart; every further one waits twice as long, at most a minute."""
    same_step_limit: int = 2
    """A step that has failed this often, with nothing gained in between, ends the run (exit code 76)."""
    elastic: bool = False
    """Go on with fewer ranks and a smaller layout when some are lost for good; grow back when they return."""
    min_workers: int = 1
    """With restart.elastic=true: the fewest ranks worth going on with."""
    wait_seconds: int = 300
    """How long nodes wait for one another, at the start and after a loss; then the run goes on without those that are missing
    (restart.elastic=true) or fails."""

    def validate(self) -> None:
        require_at_least(0, "restart", self, "limit", "backoff_seconds")
        require_at_least(1, "restart", self, "same_step_limit", "min_workers", "wait_seconds")
        if not self.elastic:
            refuse_unused("restart", self, ["min_workers"], "restart.elastic=false")
