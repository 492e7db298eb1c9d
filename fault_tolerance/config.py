"""What a recipe says about checkpoints and about going on after a failure. Free of torch."""

from dataclasses import dataclass

from bagualu.comm.errors import RecipeError


@dataclass
class CheckpointConfig:
    """`checkpoint.*` of a recipe."""

    every: int = 100
    """Steps between checkpoints; 0 saves only at the end or when asked to stop."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""
    resume: bool = False
    """Go on from the newest checkpoint of the run directory; with none there, start from the beginning and say so."""

    def validate(self) -> None:
        if self.every < 0:
            raise RecipeError(f"checkpoint.every={self.every} must be 0 or more, e.g. checkpoint.every=100")
        if self.keep < 1:
            raise RecipeError(f"checkpoint.keep={self.keep} must be at least 1, so that a run can be resumed")


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
        if self.limit < 0:
            raise RecipeError(f"restart.limit={self.limit} must be 0 or more, e.g. restart.limit=3")
        if self.backoff_seconds < 0:
            raise RecipeError(f"restart.backoff_seconds={self.backoff_seconds} must be 0 or more, e.g. restart.backoff_seconds=1")
        if self.same_step_limit < 1:
            raise RecipeError(f"restart.same_step_limit={self.same_step_limit} must be at least 1, e.g. restart.same_step_limit=2")
        if self.min_workers < 1:
            raise RecipeError(f"restart.min_workers={self.min_workers} must be at least 1, e.g. restart.min_workers=1")
        if self.min_workers > 1 and not self.elastic:
            raise RecipeError(f"restart.min_workers={self.min_workers} says how few ranks an elastic run may go on with; "
                              f"give restart.elastic=true too, or leave it out")  # fmt: skip
        if self.wait_seconds < 1:
            raise RecipeError(f"restart.wait_seconds={self.wait_seconds} must be at least 1, e.g. restart.wait_seconds=300")
