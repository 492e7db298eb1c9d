"""RMS normalisation in generated kernels. Shapes: H width."""

from typing import Any

import torch

from bagualu.comm.group import Group
from bagualu.parallel.precision import accurate_dtype
from bagualu.trainer.operators.kernel import fails, kernel_with_sums


def normalise(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, bias: torch.Tensor | None = None, group: Group | None = None
) -> torch.Tensor:
    """Returns the result of `operators.norm.rms_norm` for x [..., H] and weight [H]."""
    normed: torch.Tensor = _RMSNorm.apply(x, weight, epsilon)
    return normed


def takes(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, bias: torch.Tensor | None = None, group: Group | None = None
) -> bool:
    """Returns whether `normalise` can compute this: neither layer normalisation nor sums over several ranks."""
    return bias is None and group is None


normalise.takes, normalise.fails = takes, fails  # type: ignore[attr-defined]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        normed, scale = _scaled(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return normed  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return *_gradients(grads[0], *ctx.saved_tensors), None


@kernel_with_sums
def _scaled(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.to(accurate_dtype(x.dtype))
    scale = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype), scale


@kernel_with_sums
def _gradients(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = scale.dtype
    wide, grad = x.to(dtype), grad.to(dtype)
    normed, through = wide * scale, grad * weight.to(dtype)
    along = (normed * through).mean(-1, keepdim=True)
    return ((through - normed * along) * scale).to(x.dtype), (grad * normed).flatten(0, -2).sum(0)
