"""What a recipe says about checkpoints. Free of torch."""

from dataclasses import dataclass

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

    def validate(self) -> None:
        if self.every < 0:
            raise RecipeError(f"checkpoint.every={self.every} must be 0 or more, e.g. checkpoint.every=100")
        if self.replica_every < 0:
            raise RecipeError(f"checkpoint.replica_every={self.replica_every} must be 0 or more, e.g. checkpoint.replica_every=10")
        if self.keep < 1:
            raise RecipeError(f"checkpoint.keep={self.keep} must be at least 1, so that a run can be resumed")
