"""What a recipe says about checkpoints. Free of torch."""

from dataclasses import dataclass, field

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
    asynchronous: bool = field(default=True, metadata={"key": "async"})
    """Write in the background while training goes on; takes host memory for one more copy of this rank's part."""
    timeout_seconds: float | None = None
    """Storage that has not taken a rank's part, or the commit, by then has failed; left out, half of comm.timeout_seconds."""

    def validate(self) -> None:
        if self.every < 0:
            raise RecipeError(f"checkpoint.every={self.every} must be 0 or more, e.g. checkpoint.every=100")
        if self.keep < 1:
            raise RecipeError(f"checkpoint.keep={self.keep} must be at least 1, so that a run can be resumed")
        if self.timeout_seconds is not None and self.timeout_seconds <= 0:
            raise RecipeError(f"checkpoint.timeout_seconds={self.timeout_seconds} must be positive, or leave it out")
