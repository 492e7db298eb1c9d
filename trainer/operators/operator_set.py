"""The operators that a model computes with: of each, one variant."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bagualu.parallel.vocabulary import loss_and_gradient
from bagualu.trainer.operators.attention import causal_attention
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.gate import silu_gate
from bagualu.trainer.operators.norm import normalise
from bagualu.trainer.operators.registry import AUTO, DEFAULT_VARIANTS, load_variant
from bagualu.trainer.operators.rotary import rotate


@dataclass(frozen=True)
class OperatorSet:
    """A variant of each operator. Its default says what any variant is given and returns."""

    norm: Callable[..., torch.Tensor] = normalise
    rotary: Callable[..., torch.Tensor] = rotate
    gate: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = silu_gate
    attention: Callable[..., torch.Tensor] = causal_attention
    loss: Callable[..., tuple[torch.Tensor, torch.Tensor]] = loss_and_gradient


BY_RULE = OperatorSet()
"""What auto stands for where nothing has been measured."""


def operator_set(config: OperatorsConfig, chip: str) -> OperatorSet:
    """Returns the variants that `config` names for tensors on `chip` (`precision.chip_of`). Raises RecipeError if the chip has not
    one of them."""
    named = {operator: variant for operator, variant in config.as_dict().items() if variant != AUTO}
    return OperatorSet(**{operator: variant_of(operator, variant, chip) for operator, variant in named.items()})


def variant_of(operator: str, variant: str, chip: str) -> Callable[..., Any]:
    """Returns the variant, with the operator's default in its place for arguments that it does not take. Raises RecipeError."""
    found: Callable[..., Any] = load_variant(operator, variant, chip)
    return _OrDefault(found, load_variant(operator, DEFAULT_VARIANTS[operator], chip)) if hasattr(found, "takes") else found


@dataclass(frozen=True)
class _OrDefault:
    """Calls `variant` if it takes the arguments, else `default`."""

    variant: Any
    default: Callable[..., Any]

    def __call__(self, *given: Any, **named: Any) -> Any:
        chosen = self.variant if self.variant.takes(*given, **named) else self.default
        return chosen(*given, **named)
