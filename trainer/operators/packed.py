"""Weights of linear layers in the order in which oneDNN multiplies them on a CPU, for models that are not trained any more.

With few rows, as when one token is generated, a product takes the time in which its weight is read. oneDNN reads a weight that it
has packed once about twice as fast as torch's own products read it as it is (docs/performance.md), and with many rows no slower.

The functions that pack and multiply have no public name in torch: they are those that torch.compile uses for frozen weights on CPUs
(here with torch 2.13). Where torch has none of these names, nothing is packed.
"""

import torch

from bagualu.parallel.precision import multiply_dtype

_ROWS = 8
"""The number of rows for which weights are packed; they are multiplied with any number."""
_FUNCTIONS = ("_reorder_linear_weight", "_linear_pointwise")


def can_pack(weight: torch.Tensor) -> bool:
    """Returns whether `weight` [O, I] can be packed: on a CPU, in a dtype in which oneDNN multiplies as fast as in any other."""
    fits = (
        weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and weight.dtype == multiply_dtype(weight)
    )
    known = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in _FUNCTIONS)
    return fits and known


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Returns a packed copy of `weight` [O, I]."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
    return packed


def multiply_packed(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiplies rows [..., I] by a packed weight [O, I] and adds the bias [O]; returns [..., O]. All have the same dtype."""
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return output
