"""The gated unit of a feed-forward in generated kernels. F: width of the feed-forward."""

from typing import Any

import torch
import torch.nn.functional as F

from bagualu.parallel.precision import accurate_dtype
from bagualu.trainer.operators.kernel import fails, kernel


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Returns silu(gate) * up [..., F] for gate and up [..., F], as the first factor of `operators.gate.silu_gate`."""
    product: torch.Tensor = _Gate.apply(gate, up)
    return product, None


silu_gate.fails = fails  # type: ignore[attr-defined]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _gradients(grads[0], *ctx.saved_tensors)


@kernel
def _product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    dtype = accurate_dtype(gate.dtype)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


@kernel
def _gradients(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = accurate_dtype(gate.dtype)
    wide, grad = gate.to(dtype), grad.to(dtype)
    part = wide.sigmoid()
    slope = part * (1 + wide * (1 - part))
    return (grad * up.to(dtype) * slope).to(gate.dtype), (grad * wide * part).to(gate.dtype)
