"""What a recipe says about faults. Free of torch."""

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
    """`restart.*` of a recipe."""

    hang_seconds: float = 300.0
    """A rank that shows no progress for so long, or waits so long for one that shows none, ends the run's processes; 0: never."""
    long_hang_seconds: float = 1800.0
    """The same where nothing can be seen for long: start, first step (compilation), validation, checkpoints read and written."""

    def validate(self) -> None:
        if self.hang_seconds < 0:
            raise RecipeError(f"restart.hang_seconds={self.hang_seconds} must be 0 (never) or more, e.g. restart.hang_seconds=300")
        if self.long_hang_seconds < self.hang_seconds:
            raise RecipeError(f"restart.long_hang_seconds={self.long_hang_seconds} must be at least restart.hang_seconds="
                              f"{self.hang_seconds}; give restart.long_hang_seconds={self.hang_seconds}")  # fmt: skip


@dataclass
class StragglerConfig:
    """`straggler.*` of a recipe."""

    ratio: float = 1.5
    """A rank is slow when its own work takes this many times as long as its peers'; 0: nobody looks."""
    window_seconds: float = 10.0
    """Time over which work is summed up (5 to 1000 steps); 3 slow windows of the last 5 flag a rank."""

    def validate(self) -> None:
        if self.ratio and self.ratio <= 1:
            raise RecipeError(f"straggler.ratio={self.ratio} must be above 1, or 0 to turn it off, e.g. straggler.ratio=1.5")
        if self.window_seconds <= 0:
            raise RecipeError(f"straggler.window_seconds={self.window_seconds} must be positive, e.g. straggler.window_seconds=10")
