"""What a recipe says about communication. Free of torch, so that a wrong recipe is refused at once."""

from dataclasses import dataclass

from bagualu.comm.errors import RecipeError


@dataclass
class CommConfig:
    """`comm.*` of a recipe."""

    backend: str = "gloo"
    """gloo | nccl | simulated | any name registered under the entry point group `bagualu.backends`."""
    timeout_seconds: float = 600.0
    """A collective that has not finished by then fails on every rank."""

    def validate(self) -> None:
        if self.timeout_seconds <= 0:
            raise RecipeError(f"comm.timeout_seconds={self.timeout_seconds} must be positive, e.g. comm.timeout_seconds=600")
