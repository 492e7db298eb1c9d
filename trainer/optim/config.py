"""The optimizer as a recipe describes it. Free of torch."""

from dataclasses import dataclass, field

from bagualu.comm.errors import RecipeError

SCHEDULES = ("cosine", "wsd", "constant")


@dataclass
class OptimConfig:
    """`optim.*` of a recipe."""

    name: str = "adamw"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Applied to tensors of two or more dimensions; norms are not decayed."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    schedule: str = "cosine"
    """cosine | wsd (warmup, stable, decay) | constant; all begin with a linear warmup."""
    warmup_steps: int = 20
    final_lr_ratio: float = 0.1
    """Where cosine and wsd end, as a share of lr."""
    decay_fraction: float = 0.2
    """wsd only: share of the steps that decay linearly at the end."""

    def validate(self) -> None:
        if self.name != "adamw":
            raise RecipeError(f"optim.name={self.name} is unknown; give optim.name=adamw")
        if self.schedule not in SCHEDULES:
            raise RecipeError(f"optim.schedule={self.schedule} is unknown; give one of {', '.join(SCHEDULES)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"optim.betas={self.betas} must be two numbers in [0, 1), e.g. optim.betas=[0.9,0.95]")
        for name in ("lr", "epsilon", "weight_decay", "clip_norm", "warmup_steps"):
            if getattr(self, name) < 0:
                raise RecipeError(f"optim.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.final_lr_ratio <= 1 or not 0 <= self.decay_fraction <= 1:
            raise RecipeError("optim.final_lr_ratio and optim.decay_fraction must lie between 0 and 1")
