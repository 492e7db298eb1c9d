"""Linear layers with low-rank factors beside their weights (LoRA; lora.py says which weights have some).

Shapes: N rows, O outputs, I inputs, R rank, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bagualu.parallel.products import Products, torch_products
from bagualu.trainer.models.decoder.lora import FIRST, SECOND, LoraConfig


@dataclass(frozen=True)
class Factors:
    """The factors beside a weight [O, I], or [E, O, I]; scale * second @ first is added to it."""

    first: torch.Tensor
    """A [R, I], or [E, R, I]."""
    second: torch.Tensor
    """B [O, R], or [E, O, R]."""
    scale: float


class AdaptedModule(nn.Module):
    """A module whose weights may have factors, as parameters beside them. `products` multiplies both."""

    scale = 1.0
    products: Products = torch_products

    def factors(self, key: str) -> Factors | None:
        """Returns the factors beside the weight `key` of this module; None if it has none."""
        first = getattr(self, key + FIRST, None)
        return None if first is None else Factors(first, getattr(self, key + SECOND), self.scale)


def add_factors(module: nn.Module, prefix: str, lora: LoraConfig) -> None:
    """Adds the factors that `lora` asks for, without values, to the modules in `module`, whose parameters have names in the model
    that begin with `prefix`."""
    for inner, part in module.named_modules():
        for key, weight in list(part.named_parameters(recurse=False)):
            shapes = lora.factor_shapes(f"{prefix}{inner}.{key}", tuple(weight.shape))
            for name, shape in shapes.items():
                assert isinstance(part, AdaptedModule), name
                part.scale = lora.scale
                part.register_parameter(name.rpartition(".")[2], nn.Parameter(torch.empty(shape)))


def set_products(module: nn.Module, products: Products) -> None:
    """Makes the linear layers and experts in `module` multiply by `products`."""
    for part in module.modules():
        if isinstance(part, AdaptedModule):
            part.products = products


def first_factors(factors: Sequence[Factors | None]) -> list[torch.Tensor]:
    """Returns the factors A of those weights that have some. They read the same input as the weights, so that both can be
    multiplied in one operation."""
    return [pair.first for pair in factors if pair is not None]


def plus_products(
    results: Sequence[torch.Tensor],
    factors: Sequence[Factors | None],
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Returns an output [N, O] for each weight, given its factors.

    `results` are the products of the weights with their input, then those [N, R] of `first_factors`. `multiply` multiplies rows [N,
    R] by a factor B.
    """
    low = iter(results[len(factors) :])
    outputs = zip(results, factors, strict=False)
    return tuple(one if pair is None else one + multiply(next(low) * pair.scale, pair.second) for one, pair in outputs)
