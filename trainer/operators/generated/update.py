"""The optimizer's update by AdamW in a generated kernel, which reads and writes each buffer once. Shapes: n elements."""

from typing import Any

import torch

from bagualu.trainer.operators.kernel import fails, kernel_in_place
from bagualu.trainer.operators.update import same_memory

_ROW = 64
"""The kernel gets flat buffers as rows of so many elements: it takes any number of rows, but only rows of one size."""


def adamw(
    weight: torch.Tensor,
    working: torch.Tensor,
    gradient: torch.Tensor,
    average: torch.Tensor,
    square: torch.Tensor,
    step: torch.Tensor,
    factor: float,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """Does the update of `operators.update.adamw`, for tensors [n]. What changes from step to step is given to the kernel as
    tensors, since numbers are part of its code."""
    first, second = betas
    count = step.to(torch.float64)
    size, scale = (1 - first**count).reciprocal().mul(lr), (1 - second**count).rsqrt()
    keeps, factors = (torch.full((), value, dtype=torch.float64, device=step.device) for value in (1 - lr * weight_decay, factor))
    numbers = factors, keeps, size, scale, first, second, epsilon
    alone, whole = same_memory(weight, working), weight.numel() // _ROW * _ROW
    for part, shape in ((slice(whole), (-1, _ROW)), (slice(whole, None), (-1,))):
        buffers = [buffer[part].view(shape) for buffer in (weight, gradient, average, square)]
        if buffers[0].numel():
            update, given = (_update, ()) if alone else (_update_and_round, (working[part].view(shape),))
            (update if len(shape) > 1 else update.function)(*given, *numbers, *buffers)


adamw.fails = fails  # type: ignore[attr-defined]


def _moved(
    factor: torch.Tensor,
    keeps: torch.Tensor,
    size: torch.Tensor,
    scale: torch.Tensor,
    first: float,
    second: float,
    epsilon: float,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    average: torch.Tensor,
    square: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the new weight and moments. The weight is multiplied by `keeps`, and `size` is that of the step. `size` and
    `scale` correct for moments that begin as zeros."""
    factor, keeps, size, scale = (value.to(weight.dtype) for value in (factor, keeps, size, scale))
    gradient = gradient * factor
    average = average * first + gradient * (1 - first)
    square = square * second + gradient * gradient * (1 - second)
    return weight * keeps - size * average / (square.sqrt() * scale + epsilon), average, square


@kernel_in_place
def _update(*given: Any) -> tuple[torch.Tensor, ...]:
    """Takes the arguments of `_moved`."""
    weight, _, average, square = given[-4:]
    moved, mean, spread = _moved(*given)
    return weight.copy_(moved), average.copy_(mean), square.copy_(spread)


@kernel_in_place
def _update_and_round(working: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    """Takes working weights in another dtype, and the arguments of `_moved`."""
    weight, _, average, square = given[-4:]
    moved, mean, spread = _moved(*given)
    return weight.copy_(moved), average.copy_(mean), square.copy_(spread), working.copy_(moved)
