"""The `optim` section of a recipe."""

from dataclasses import dataclass, field

from bagualu.comm.checks import refuse_unused, require_at_least, require_representable
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
    """Decoupled weight decay, applied to parameters of two or more dims; weights of norms are not decayed."""
    clip_norm: float = 1.0
    """If the norm of the whole model's gradient is larger than this, the gradient is scaled down to it; 0 turns clipping off."""
    schedule: str = "cosine"
    """The curve of the learning rate: cosine | wsd (warmup, stable, decay) | constant; all begin with a linear warmup.
    docs/guides/learning_rate.md shows the curves."""
    warmup_steps: int = 20
    final_lr_ratio: float = 0.1
    """The learning rate of the last step under cosine and wsd, as a fraction of lr. With 0, the rate would reach 0 one step after
    the last."""
    decay_fraction: float = 0.2
    """wsd only: the share of train.steps, at the end, in which the learning rate decays linearly."""

    def decay_steps(self, steps: int) -> int:
        """Returns in how many of `steps` steps the learning rate decays under wsd."""
        return round(self.decay_fraction * steps)

    def validate_steps(self, steps: int) -> None:
        """Raises RecipeError if, under wsd, the warmup ends after the decay has begun: the learning rate would drop in one step to
        where the decay has come by then."""
        decay = self.decay_steps(steps) if self.schedule == "wsd" else 0
        if decay and self.warmup_steps + decay > steps:
            raise RecipeError(f"optim.warmup_steps={self.warmup_steps} reaches into the decay, which with optim.decay_fraction="
                              f"{self.decay_fraction} are the last {decay} of train.steps={steps}; give optim.warmup_steps="
                              f"{steps - decay} or a smaller optim.decay_fraction")  # fmt: skip

    def validate(self, dtype: str = "float32") -> None:
        """Raises RecipeError for invalid values. `dtype`: the dtype of the optimizer's weights and moments."""
        if self.name != "adamw":
            raise RecipeError(f"optim.name={self.name} is unknown; give optim.name=adamw")
        if self.schedule not in SCHEDULES:
            raise RecipeError(f"optim.schedule={self.schedule} is unknown; give one of {', '.join(SCHEDULES)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"optim.betas={self.betas} must be two numbers in [0, 1), e.g. optim.betas=[0.9,0.95]")
        require_at_least(0, "optim", self, "lr", "epsilon", "weight_decay", "clip_norm", "warmup_steps")
        require_representable("optim", self, dtype, "lr", "weight_decay", "clip_norm")
        require_representable("optim", self, dtype, "epsilon", zero=False)
        if self.lr * self.weight_decay > 2:
            example = f"optim.lr={OptimConfig.lr} optim.weight_decay={OptimConfig.weight_decay}"
            raise RecipeError(f"optim.lr={self.lr} times optim.weight_decay={self.weight_decay} is more than 2, so that the decay "
                              f"makes weights grow; give smaller ones, e.g. {example}")  # fmt: skip
        for name in ("final_lr_ratio", "decay_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise RecipeError(f"optim.{name}={value} must lie between 0 and 1, e.g. optim.{name}={getattr(OptimConfig, name)}")
        unused = {"cosine": ["decay_fraction"], "wsd": [], "constant": ["decay_fraction", "final_lr_ratio"]}[self.schedule]
        refuse_unused("optim", self, unused, f"optim.schedule={self.schedule}")
