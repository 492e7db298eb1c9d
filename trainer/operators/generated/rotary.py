"""Rotary positions in generated kernels. Shapes: B batch, S sequence, A heads, D head width."""

from typing import Any

import torch

from bagualu.trainer.operators.kernel import fails, kernel


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns the result of `operators.rotary.rotate` for x [B, S, A, D], cos and sin [S, D] or [B, S, D]."""
    rotated: torch.Tensor = _Rotate.apply(x, cos, sin)
    return rotated


rotate.fails = fails  # type: ignore[attr-defined]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotated_back(grads[0], cos, sin), None, None


@kernel
def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _turned(x, cos, sin)


@kernel
def _rotated_back(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _turned(x, cos, -sin)  # the transpose of a rotation is the rotation by the opposite angle


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns x rotated half by half, which lets the compiler read whole vectors; the first sine is already negated."""
    (low, high), (cos_low, cos_high), (sin_low, sin_high) = (t.chunk(2, -1) for t in (x, cos.unsqueeze(-2), sin.unsqueeze(-2)))
    return torch.cat((low * cos_low + high * sin_low, high * cos_high + low * sin_high), -1).to(x.dtype)
