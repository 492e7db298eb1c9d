"""The kernels that torch chooses for tensors on a chip, for tensors on the meta device that stand for those of the chip.

For tensors without values torch chooses no fused kernel: it would compute attention and norms in many steps, each with results of
its own, which a chip never makes.
"""

from typing import Any

import torch

from bagualu.parallel.precision import chip_of

_LIBRARY = torch.library.Library("bagualu", "DEF")
_LIBRARY.define("rms_norm(Tensor x, Tensor weight) -> (Tensor, Tensor)")
_LIBRARY.define("rms_norm_backward(Tensor grad, Tensor x, Tensor scale, Tensor weight) -> (Tensor, Tensor)")


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Returns the output [B, A, S, D] of the chip's kernel for causal attention; key and value may have fewer heads. `scale`: of
    scores, by default 1 / sqrt(D)."""
    kernels = torch.ops.aten
    cpu = chip_of(query.device) == "cpu"
    kernel = kernels._scaled_dot_product_flash_attention_for_cpu if cpu else kernels._scaled_dot_product_flash_attention
    output: torch.Tensor = kernel(query, key, value, 0.0, True, scale=scale)[0]
    return output


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the output of the kernel for RMS normalisation, in the shape of x."""
    normed: torch.Tensor = _RMSNorm.apply(x, weight)
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed, scale = torch.ops.bagualu.rms_norm(x, weight)
        ctx.save_for_backward(x, weight, scale)
        return normed  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        return torch.ops.bagualu.rms_norm_backward(grads[0], x, scale, weight)


def _forward(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _backward(grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


_LIBRARY.impl("rms_norm", _forward, "Meta")
_LIBRARY.impl("rms_norm_backward", _backward, "Meta")
