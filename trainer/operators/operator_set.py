"""The operators that a model and its optimizer compute with: of each, one variant."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bagualu.comm.errors import RecipeError
from bagualu.parallel.products import Products, torch_products
from bagualu.parallel.vocabulary import loss_and_gradient
from bagualu.trainer.operators.attention import causal_attention
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.gate import silu_gate
from bagualu.trainer.operators.norm import normalise
from bagualu.trainer.operators.registry import AUTO, DEFAULT_VARIANTS, GENERATED, is_float8, load_variant
from bagualu.trainer.operators.rotary import rotate
from bagualu.trainer.operators.update import adamw


@dataclass(frozen=True)
class OperatorSet:
    """A variant of each operator. Its default says what any variant is given and returns."""

    norm: Callable[..., torch.Tensor] = normalise
    rotary: Callable[..., torch.Tensor] = rotate
    gate: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = silu_gate
    attention: Callable[..., torch.Tensor] = causal_attention
    loss: Callable[..., tuple[torch.Tensor, torch.Tensor]] = loss_and_gradient
    linear: Products = torch_products
    update: Callable[..., None] = adamw


BY_RULE = OperatorSet()
"""What auto stands for where nothing has been measured."""


def operator_set(config: OperatorsConfig, chip: str, here: bool = True) -> OperatorSet:
    """Returns the variants that `config` names for tensors on `chip` (`precision.chip_of`). Raises RecipeError if the chip has not
    one of them. `here`: whether this machine computes with them, or they are traced for another."""
    named = {operator: variant for operator, variant in config.as_dict().items() if variant != AUTO}
    chosen: dict[str, Any] = {operator: variant_of(operator, variant, chip, here) for operator, variant in named.items()}
    return OperatorSet(**chosen)


def variant_of(operator: str, variant: str, chip: str, here: bool = True) -> Any:
    """Returns the variant, with the operator's default in its place for arguments that it does not take. Raises RecipeError if the
    chip has it not or, `here`, if this machine lacks something for it."""
    found: Callable[..., Any] = load_variant(operator, variant, chip)
    if here and (lacked := _lacked(found, chip)) is not None:
        instead = "train.dtype=bfloat16" if is_float8(variant, operator) else f"operators.{operator}={AUTO}"
        raise RecipeError(f"operators.{operator}={variant} needs {lacked}, which this machine has not; provide it, or give "
                          f"{instead}")  # fmt: skip
    if operator == "linear":
        if isinstance(found, Products) and is_float8(variant) and found.without_float8 is found:
            raise RecipeError(f"operators.linear={variant} multiplies the head too in float8; give {type(found).__name__} a "
                              "property `without_float8` for it, e.g. parallel.products.torch_products")  # fmt: skip
        if isinstance(found, Products):
            return found
        raise RecipeError(f"operators.linear={variant} is registered as {found!r}; it must be an object of the class "
                          "bagualu.parallel.products.Products or a subclass")  # fmt: skip
    return _OrDefault(found, load_variant(operator, DEFAULT_VARIANTS[operator], chip)) if hasattr(found, "takes") else found


def lacked_by(config: OperatorsConfig, given: OperatorsConfig, chip: str) -> dict[str, str]:
    """Returns what this machine lacks for variants of `config`, by operator, and makes them ready. A variant that `given` names is
    left out unless it is generated, and so is one in float8, since `variant_of` refuses it. Raises RecipeError for a variant that
    cannot be had anyway."""
    refused = {operator: variant for operator, variant in given.as_dict().items() if variant != GENERATED}
    found = {operator: variant for operator, variant in config.as_dict().items()
             if variant not in (AUTO, refused.get(operator)) and not is_float8(variant, operator)}  # fmt: skip
    loaded = {operator: load_variant(operator, variant, chip) for operator, variant in found.items()}
    lacked = {operator: _lacked(variant, chip) or _failure(variant, chip) for operator, variant in loaded.items()}
    return {operator: what for operator, what in lacked.items() if what is not None}


def is_usable(operator: str, variant: str, chip: str) -> bool:
    """Returns whether this machine lacks nothing for the variant. Raises RecipeError if it cannot be had anyway."""
    return _lacked(load_variant(operator, variant, chip), chip) is None


def _lacked(variant: Any, chip: str) -> str | None:
    if hasattr(variant, "lacks_on"):
        lacked: str | None = variant.lacks_on(chip)
    else:
        lacked = variant.lacks() if hasattr(variant, "lacks") else None
    return lacked


def _failure(variant: Any, chip: str) -> str | None:
    failure: str | None = variant.fails(chip) if hasattr(variant, "fails") else None
    return failure


@dataclass(frozen=True)
class _OrDefault:
    """Calls `variant` if it takes the arguments, else `default`."""

    variant: Any
    default: Callable[..., Any]

    def __call__(self, *given: Any, **named: Any) -> Any:
        chosen = self.variant if self.variant.takes(*given, **named) else self.default
        return chosen(*given, **named)
