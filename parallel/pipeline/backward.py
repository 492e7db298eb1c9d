"""Runs a backward pass from given gradients, like torch.autograd.backward but without its slow imports.

To compare the shapes of given gradients, torch imports its symbolic shapes and sympy: two thirds of a second and 34 MB in the first
step of every process. A scalar output without a given gradient needs no comparison, and the shapes compared here are plain numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch


def backward(outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
    """Adds to the gradient of every leaf tensor the derivative, with respect to that leaf, of the sum of all `(output *
    gradient).sum()`.

    Raises ValueError if a gradient's shape differs from its output's.
    """
    for output, gradient in zip(outputs, gradients, strict=True):
        if output.shape != gradient.shape:
            raise ValueError(f"an output of shape {list(output.shape)} has no gradient of shape {list(gradient.shape)}")
    with torch.enable_grad():
        starts = [_Start.apply(output, gradient) for output, gradient in zip(outputs, gradients, strict=True)]
    torch.autograd.backward(starts)


class _Start(torch.autograd.Function):
    """Returns a zero whose backward pass continues at `output` with `gradient`."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return gradient.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None
