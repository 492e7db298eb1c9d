"""RMS and layer normalisation. Shapes: N rows, H width."""

from typing import Any

import torch
import torch.nn.functional as F

from bagualu.comm.agree import summed
from bagualu.comm.group import Group
from bagualu.parallel.precision import accurate_dtype, chip_of
from bagualu.trainer.operators import fused


def normalise(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, bias: torch.Tensor | None = None, group: Group | None = None
) -> torch.Tensor:
    """Returns the result of `rms_norm` for x [..., H] and weight [H] or, with a bias [H], that of `layer_norm`, for which there is
    no group."""
    return rms_norm(x, weight, epsilon, group) if bias is None else layer_norm(x, weight, bias, epsilon)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, group: Group | None = None) -> torch.Tensor:
    """Returns x / sqrt(mean(x^2) + epsilon) * weight over the last dim, computed in at least float32 (arXiv 1910.07467, equation
    4). `group`: the ranks whose x are equal parts of that dim; None if this rank has the whole. Collective over it."""
    if chip_of(x.device) == "cuda" and group is None:  # torch has a fused kernel for it, which accumulates in float32
        if x.is_meta:
            return fused.rms_norm(x, weight)
        return F.rms_norm(x, (x.shape[-1],), weight, epsilon)
    if not torch.is_grad_enabled():
        return _scaled(x, weight, epsilon, group)[0]
    normed: torch.Tensor = _RMSNorm.apply(x, weight, epsilon, group)
    return normed


def _scaled(x: torch.Tensor, weight: torch.Tensor, epsilon: float, group: Group | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the result of `rms_norm`, and 1 / sqrt(mean(x^2) + epsilon) [..., 1]."""
    dtype = accurate_dtype(x.dtype)
    wide = x.to(dtype)
    length: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    width = x.shape[-1] * (group.size if group else 1)
    scale = _total(length.square_(), group).div_(width).add_(epsilon).rsqrt_()
    return (wide * scale).mul_(weight.to(dtype)).to(x.dtype), scale


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Returns (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias over the last dim, computed in at least float32 (arXiv
    1607.06450, section 3)."""
    if chip_of(x.device) == "cuda":  # whose kernel accumulates in float32
        return F.layer_norm(x, (x.shape[-1],), weight, bias, epsilon)
    normed: torch.Tensor = _LayerNorm.apply(x, weight, bias, epsilon)
    return normed


class _RMSNorm(torch.autograd.Function):
    """Saves x for the backward pass in its own dtype. torch's own version on the CPU, several operations, saves a float32 copy and
    takes twice as long."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, group: Group | None) -> torch.Tensor:
        ctx.group, ctx.width = group, x.shape[-1] * (group.size if group else 1)
        normed, scale = _scaled(x, weight, epsilon, group)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        dtype, scale = scale.dtype, scale.flatten(0, -2)  # rows from here on
        wide, grad, factors = x.flatten(0, -2).to(dtype), grads[0].flatten(0, -2).to(dtype), weight.to(dtype)
        products = wide * grad
        grad_weight = scale.squeeze(1) @ products
        total = _total(torch.mv(products, factors).unsqueeze(1), ctx.group)
        along = total.mul_(scale).div_(ctx.width).mul_(scale).mul_(scale)
        grad_x = (grad * factors).mul_(scale).addcmul_(wide, along, value=-1)
        return grad_x.to(x.dtype).view_as(x), grad_weight, None, None


def _total(sums: torch.Tensor, group: Group | None) -> torch.Tensor:
    """Returns the sum of `sums` over the ranks of `group`, which may be the same memory."""
    return sums if group is None else summed(sums, group).to(sums.dtype)


class _LayerNorm(torch.autograd.Function):
    """Applies torch's kernel in at least float32, in which it also returns the gradients of weight and bias, but saves x in its own
    dtype."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
        dtype = accurate_dtype(x.dtype)
        normed, mean, scale = torch.native_layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), epsilon)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        return normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, bias, mean, scale = ctx.saved_tensors
        dtype = scale.dtype
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grads[0].to(dtype), x.to(dtype), x.shape[-1:], mean, scale, weight.to(dtype), bias.to(dtype), ctx.needs_input_grad[:3]
        )
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, grad_bias, None
