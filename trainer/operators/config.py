"""The operators section of a recipe. Does not import torch."""

from dataclasses import dataclass, fields, replace

from bagualu.comm.errors import RecipeError
from bagualu.trainer.operators.registry import AUTO, FLOAT8, GENERATED, is_float8, require_variant

_GENERATED = ("norm", "rotary", "gate", "loss")
"""The operators whose variant "generated" (trainer/operators/generated) train.compile chooses. `update` has one too, which a recipe
must name: on a CPU it takes longer than torch's kernel."""


@dataclass
class OperatorsConfig:
    """`operators.*`: by which of its registered variants each operator of the model is computed; auto: the one that suits the chip
    and the shapes. A value that is unknown is refused with the variants that there are. A variant does not compute every shape;
    the default (eager, attention's kernel, torch, fused) takes its place where it does not."""

    norm: str = AUTO
    """RMS and layer normalisation: auto | eager | generated: by a kernel that torch's compiler generates | any name registered
    under the entry point group `bagualu.operators`."""
    rotary: str = AUTO
    """The rotation of queries and keys by their positions: auto | eager | generated | any registered name."""
    gate: str = AUTO
    """The gated unit of feed-forwards and experts, silu(gate) * up: auto | eager | generated | any registered name."""
    attention: str = AUTO
    """auto | kernel: torch's | blocks: on a CPU, plain matrix products for many heads together | tiles: on a CPU with AVX512-BF16,
    a kernel in C++ | any registered name."""
    loss: str = AUTO
    """The cross-entropy of a chunk of tokens and its gradient, given logits: auto | eager | generated | any registered name."""

    linear: str = AUTO
    """The matrix products of linear layers, experts and the head: auto | torch: its own | tiles: on a CPU with AVX512-BF16, kernels
    in C++ | panels: on one with AVX2, for float32 and bfloat16 | any registered name. With train.dtype=float8, auto is
    float8_rowwise: a scale for each row and column of a product; float8_tensorwise has one scale for each matrix."""

    update: str = AUTO
    """The optimizer's update by AdamW: auto | fused: by torch's kernel | generated | any registered name."""

    def as_dict(self) -> dict[str, str]:
        """Returns the variants by operator."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def generated(self) -> "OperatorsConfig":
        """Returns the same with generated kernels in place of auto, where there are any."""
        return replace(self, **dict.fromkeys(generated_of(self), GENERATED))

    def in_float8(self) -> "OperatorsConfig":
        """Returns the same with linear layers in float8, by the usual variant if none is named."""
        return self if is_float8(self.linear) else replace(self, linear=FLOAT8[0])

    def validate(self, chip: str | None, dtype: str) -> None:
        """Raises RecipeError for a variant that is not registered, that `chip` has not (None: the chip is not known yet), or that
        does not go with train.dtype=`dtype`."""
        for operator, variant in self.as_dict().items():
            require_variant(operator, variant, chip)
        if dtype == "float8" and self.linear != AUTO and not is_float8(self.linear):
            raise RecipeError(f"operators.linear={self.linear} does not multiply in float8, as train.dtype=float8 asks for; give "
                              f"operators.linear={FLOAT8[0]} or {FLOAT8[1]}, or train.dtype=bfloat16")  # fmt: skip
        if dtype != "float8" and is_float8(self.linear):
            raise RecipeError(f"operators.linear={self.linear} is for train.dtype=float8, but the recipe has train.dtype={dtype}; "
                              f"give train.dtype=float8, or operators.linear={AUTO}")  # fmt: skip


def generated_of(config: OperatorsConfig) -> list[str]:
    """Returns the operators that are left to auto and have a variant whose kernels are generated."""
    return [name for name in _GENERATED if getattr(config, name) == AUTO]
