"""The `optim` section of a recipe."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

from bagualu.comm.checks import RANGES, refuse_unused, require_at_least, require_representable
from bagualu.comm.errors import RecipeError
from bagualu.trainer.optim.groups import EXAMPLE, ParameterGroup, Treatment, group_of

SCHEDULES = ("cosine", "wsd", "constant")
RULES = {
    "adamw": ["momentum", "adjust_lr"],
    "lion": ["momentum", "epsilon", "adjust_lr"],
    "muon": [],
    "sgd": ["betas", "epsilon", "adjust_lr"],
}
"""The optimizers, each with the keys that it does not use."""
USING_ADAMW = ("adamw", "muon")
"""The optimizers that update some parameters, or all of them, by AdamW."""
ADJUSTMENTS = ("match_rms_adamw", "original")
_TABLES = ("embedding.weight", "embedding.positions.weight", "head.weight")
"""Matrices for which muon uses AdamW. Their rows stand for tokens, of which each step changes a few: orthogonal updates are for the
matrices between the layers' activations."""


@dataclass
class OptimConfig:
    """`optim.*` of a recipe."""

    name: str = "adamw"
    """adamw | lion | muon | sgd; docs/guides/optimizers.md describes them. muon updates the hidden matrices, each expert's by
    itself; embedding, head and vectors are updated by AdamW, with the same lr and the betas and epsilon below."""
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """adamw: how much of the first and of the second moment each step keeps. lion: how much of the average counts in the update,
    and how much of it each step keeps; [0.9,0.99] is usual."""
    momentum: float | None = None
    """sgd and muon: how much of the momentum each step keeps; 0 for none. Default: 0.9 for sgd, 0.95 for muon."""
    adjust_lr: str = "match_rms_adamw"
    """muon only: by what the learning rate of a matrix [A, B] is multiplied, as in torch.optim.Muon. match_rms_adamw:
    0.2 * sqrt(max(A, B)), so that updates are as large as AdamW's and the same lr serves both; original: sqrt(max(1, A / B))."""
    epsilon: float = 1e-8
    """adamw, also under muon: added to the root of the second moment."""
    weight_decay: float = 0.1
    """Weight decay of parameters of two or more dims; weights of norms are not decayed. Decoupled from the gradient for adamw,
    lion and muon, added to it for sgd, as torch does."""
    groups: list[Any] = field(default_factory=list, metadata={"example": EXAMPLE})
    """Parameters with a learning rate or a weight decay of their own, e.g. [{pattern: "*norm.weight", lr: 1e-4}], that muon is to
    leave to AdamW or not ({pattern: "*.router.weight", optimizer: adamw}), or that are not trained ({pattern: "layers.0.*",
    frozen: true}). The first entry whose pattern matches a parameter's name counts; a rate follows the same schedule as
    optim.lr."""
    moments_dtype: str = "float32"
    """float32: moments have the dtype of the master weights (float64 in a float64 model); bfloat16: half the memory, with
    stochastic rounding whose bits depend on run.seed, the parameter, the element and the step alone."""
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

    @property
    def momentum_kept(self) -> float:
        """`momentum` with the default resolved."""
        return {"muon": 0.95}.get(self.name, 0.9) if self.momentum is None else self.momentum

    def moments(self, optimizer: str) -> tuple[str, ...]:
        """Returns the names of the moments, as in checkpoints, that are kept of each parameter with this optimizer
        (`Treatment.optimizer`)."""
        momentum = ("momentum_buffer",) if self.momentum_kept else ()
        return {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",), "muon": momentum, "sgd": momentum}[optimizer]

    def all_moments(self, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Returns the names of the moments that are kept of any parameter. `shapes`: those of all parameters, by name."""
        trained = [(name, len(shape)) for name, shape in shapes.items() if not self.freezes(name)]
        return {moment for name, dims in trained for moment in self.moments(self.treatment(name, dims).optimizer)}

    def to_keep(self, moments: set[str], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Returns the least change of optim.name and optim.momentum, as typed, with which exactly `moments` are kept; None if there
        is no such change. `shapes`: those of all parameters, by name."""
        fitting: list[list[str]] = []
        for name, momentum in product(RULES, dict.fromkeys((self.momentum, None, 0.0))):
            other = replace(self, name=name, momentum=momentum)
            with suppress(RecipeError):
                other.validate()
                if other.all_moments(shapes) == moments:
                    changes = [f"optim.name={name}"] if name != self.name else []
                    changes += [f"optim.momentum={'null' if momentum is None else momentum}"] if momentum != self.momentum else []
                    fitting.append(changes)
        least = min(fitting, key=len, default=None)
        return None if least is None else " ".join(least)

    @property
    def parameter_groups(self) -> list[ParameterGroup]:
        """`groups`, read. Raises RecipeError for an entry that describes none."""
        return [ParameterGroup.read(entry) for entry in self.groups]

    def rates(self, group: ParameterGroup | None) -> tuple[float, float]:
        """Returns the learning rate, in place of `lr`, and the weight decay of matrices in `group`."""
        lr = self.lr if group is None or group.lr is None else group.lr
        return lr, self.weight_decay if group is None or group.weight_decay is None else group.weight_decay

    def treatment(self, name: str, dims: int) -> Treatment:
        """Returns how the optimizer treats the parameter `name` of `dims` dims."""
        group = group_of(self.parameter_groups, name)
        lr, decay = self.rates(group)
        decayed = dims >= 2 or (group is not None and group.weight_decay is not None)
        own = "adamw" if self.name == "muon" and (dims < 2 or name in _TABLES) else self.name
        optimizer = own if group is None or group.optimizer is None else group.optimizer
        return Treatment(lr / self.lr if self.lr else 0.0, decay if decayed else 0.0, optimizer)

    def freezes(self, name: str) -> bool:
        """Returns whether the parameter `name` is not trained."""
        group = group_of(self.parameter_groups, name)
        return group is not None and group.frozen

    def check_patterns(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises RecipeError for a group that no parameter of the model belongs to or that wants muon for a vector, and if muon has
        no matrix to train. `shapes`: those of all parameters, by name."""
        groups, existing = self.parameter_groups, list(shapes)
        used = {id(group_of(groups, name)) for name in existing}
        for group in groups:
            if id(group) not in used:
                some = ", ".join(existing[:: max(1, len(existing) // 4)][:4])
                why = "matches no parameter" if not any(fnmatchcase(name, group.pattern) for name in existing) else (
                      "matches only parameters of earlier groups")  # fmt: skip
                raise RecipeError(f"optim.groups: {group.pattern} {why}; give another pattern, e.g. one that matches {some}")
        if all(map(self.freezes, existing)):
            raise RecipeError("optim.groups freezes all parameters; leave some of them to train")
        by_muon = [name for name in existing if self.treatment(name, len(shapes[name])).optimizer == "muon"]
        for name in by_muon:
            if len(shapes[name]) < 2 and (wrong := group_of(groups, name)):
                raise RecipeError(f"optim.groups: {wrong.pattern} with optimizer: muon matches {name}, which is no matrix; give a "
                                  "pattern of matrices, or optimizer: adamw")  # fmt: skip
        if self.name == "muon" and all(map(self.freezes, by_muon)):
            raise RecipeError("optim.groups leaves optim.name=muon no matrix to train; give optim.name=adamw, or leave it some")

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
        if self.name not in RULES:
            raise RecipeError(f"optim.name={self.name} is unknown; give one of {', '.join(RULES)}")
        if self.schedule not in SCHEDULES:
            raise RecipeError(f"optim.schedule={self.schedule} is unknown; give one of {', '.join(SCHEDULES)}")
        if self.moments_dtype not in ("float32", "bfloat16"):
            raise RecipeError(f"optim.moments_dtype={self.moments_dtype} is unknown; give one of float32, bfloat16")
        if self.moments_dtype == "bfloat16" and dtype == "float64":
            raise RecipeError("optim.moments_dtype=bfloat16 does not go with train.dtype=float64; give optim.moments_dtype=float32")
        if self.adjust_lr not in ADJUSTMENTS:
            raise RecipeError(f"optim.adjust_lr={self.adjust_lr} is unknown; give one of {', '.join(ADJUSTMENTS)}")
        if self.moments_dtype == "bfloat16" and not self.moments(self.name) and self.name != "muon":
            raise RecipeError("optim.moments_dtype=bfloat16 has no effect with optim.momentum=0, without moments; leave it out")
        if not 0 <= self.momentum_kept < 1:
            raise RecipeError(f"optim.momentum={self.momentum} must lie in [0, 1), e.g. optim.momentum=0.9")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"optim.betas={self.betas} must be two numbers in [0, 1), e.g. optim.betas=[0.9,0.95]")
        require_at_least(0, "optim", self, "lr", "epsilon", "weight_decay", "clip_norm", "warmup_steps")
        require_representable("optim", self, dtype, "lr", "weight_decay", "clip_norm")
        require_representable("optim", self, dtype, "epsilon", zero=False)
        refuse_unused("optim", self, RULES[self.name], f"optim.name={self.name}")
        for group in self.parameter_groups:
            for key in ("lr", "weight_decay"):
                value, (least, most) = getattr(group, key), RANGES[dtype]
                if value and not least <= value <= most:
                    raise RecipeError(f"optim.groups: {key}={value} of {group.pattern} cannot be computed with in {dtype}; give 0 "
                                      f"or a number between {least:.3g} and {most:.3g}")  # fmt: skip
            if group.optimizer and self.name != "muon":
                raise RecipeError(f"optim.groups: optimizer={group.optimizer} of {group.pattern} has no effect with optim.name="
                                  f"{self.name}; leave it out, or give optim.name=muon")  # fmt: skip
            if group.lr and not self.lr:
                raise RecipeError(f"optim.groups: lr={group.lr} of {group.pattern} follows the schedule of optim.lr, which is 0; "
                                  f"give optim.lr={group.lr}, and freeze what is not to be trained")  # fmt: skip
        for some in (None, *self.parameter_groups):
            lr, decay = self.rates(some)
            if lr * decay > 2:
                example = f"optim.lr={OptimConfig.lr} optim.weight_decay={OptimConfig.weight_decay}"
                where = f" of {some.pattern}" if some else ""
                raise RecipeError(f"optim.lr={lr} times optim.weight_decay={decay}{where} is more than 2, so that the decay "
                                  f"makes weights grow; give smaller ones, e.g. {example}")  # fmt: skip
        for name in ("final_lr_ratio", "decay_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise RecipeError(f"optim.{name}={value} must lie between 0 and 1, e.g. optim.{name}={getattr(OptimConfig, name)}")
        unused = {"cosine": ["decay_fraction"], "wsd": [], "constant": ["decay_fraction", "final_lr_ratio"]}[self.schedule]
        refuse_unused("optim", self, unused, f"optim.schedule={self.schedule}")
