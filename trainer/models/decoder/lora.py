"""Low-rank adaptation (LoRA, arXiv 2106.09685, section 4.1): which weights of the decoder have factors, and their names and shapes.

Shapes: O outputs, I inputs, R rank. Beside a weight W [O, I], which stays as it is, two factors are trained, A [R, I] and B [O, R]:

    y = W x + alpha / R * B (A x)

The factors of stacked experts [E, O, I] are stacked too. B begins at zero, so that a run begins with the model that it adapts. This
module does not import torch.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from bagualu.comm.checks import refuse_unused, require_at_least, require_at_most
from bagualu.comm.errors import RecipeError

FIRST, SECOND = "_lora_a", "_lora_b"
"""What the names of the factors A and B have after that of their weight."""
_MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
"""The linear layers of attention and feed-forward, by their own names."""
_LARGEST = 2**16
"""The largest rank that is accepted."""


@dataclass
class LoraConfig:
    """`model.lora.*`: trains low-rank factors beside the weights of linear layers, and nothing else. Weights come from
    model.from."""

    rank: int | None = field(default=None, metadata={"example": "16"})
    """The rank of the factors; left out, there are none, and all parameters are trained."""
    alpha: float | None = field(default=None, metadata={"example": "32"})
    """The product of the factors is multiplied by alpha / rank; left out, by 1."""
    targets: list[str] = field(default_factory=lambda: ["*"])
    """The linear layers that have factors: shell-style patterns, of which one must match the name of the weight, e.g.
    "layers.0.*" or "*.attention.*", or the layer's own name: query | key | value | output | gate | up | down, in attention and
    feed-forward, those of experts included. Default: all of these."""

    @property
    def scale(self) -> float:
        """The factor of the product of the factors; 1 without a rank."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Returns whether the parameter `name` has factors."""
        if self.rank is None or (own := _matrix(name)) is None:
            return False
        return any(fnmatchcase(name, target) or own == target for target in self.targets)

    def trains(self, name: str) -> bool:
        """Returns whether the parameter `name` is trained, so far as this section says."""
        return self.rank is None or name.endswith((FIRST, SECOND))

    def factor_shapes(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the factors of the weight `name` of `shape`, by name; {} if it has none."""
        if self.rank is None or not self.adapts(name):
            return {}
        return {name + FIRST: (*shape[:-2], self.rank, shape[-1]), name + SECOND: (*shape[:-1], self.rank)}

    def with_factors(self, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Returns `shapes`, by names that follow `prefix` in the model, with those of the factors: each module's after the module's
        own parameters."""
        if self.rank is None:
            return dict(shapes)
        result: dict[str, tuple[int, ...]] = {}
        for _, of_module in groupby(shapes.items(), key=lambda item: item[0].rpartition(".")[0]):
            own = dict(of_module)
            factors = (self.factor_shapes(prefix + name, shape) for name, shape in own.items())
            result |= own | {name.removeprefix(prefix): shape for some in factors for name, shape in some.items()}
        return result

    def identity(self) -> dict[str, Any]:
        """Returns what must be equal for a checkpoint to fit, by key. `alpha` is the same whether it was given or left out."""
        alpha = None if self.rank is None else self.scale * self.rank
        return {"rank": self.rank, "alpha": alpha, "targets": list(self.targets)}

    def validate(self) -> None:
        """Raises RecipeError for values that are wrong for every model."""
        if self.rank is None:
            refuse_unused("model.lora", self, ["alpha", "targets"], "model.lora.rank=null")
            return
        require_at_least(1, "model.lora", self, "rank")
        require_at_most(_LARGEST, "model.lora", self, "rank")
        if self.alpha is not None and self.alpha <= 0:
            example = f"model.lora.alpha={self.rank}"
            raise RecipeError(f"model.lora.alpha={self.alpha} must be positive; give e.g. {example}, or leave it out")
        if not self.targets:
            raise RecipeError("model.lora.targets=[] leaves nothing to train; leave it out for all linear layers")

    def check_targets(self, names: Collection[str]) -> None:
        """Raises RecipeError for a target that none of the parameters `names`, all of the model's without factors, matches."""
        if self.rank is None:
            return
        linear = {name: own for name in names if (own := _matrix(name)) is not None}
        for target in self.targets:
            if not any(fnmatchcase(name, target) or own == target for name, own in linear.items()):
                some = "is no linear layer of attention or feed-forward" if any(fnmatchcase(name, target) for name in names) else (
                       "matches no parameter")  # fmt: skip
                owns = ", ".join(dict.fromkeys(linear.values()))
                raise RecipeError(f"model.lora.targets: {target} {some}; give some of {owns}, or a pattern of names such as "
                                  f"{next(iter(linear))}")  # fmt: skip


def _matrix(name: str) -> str | None:
    """Returns the own name of the linear layer in a decoder layer whose weight is the parameter `name`; None for any other
    parameter."""
    if not name.startswith("layers."):
        return None
    own = name.removesuffix(".weight").rpartition(".")[2]
    return own if own in _MATRICES else None
