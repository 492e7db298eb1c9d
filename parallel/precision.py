"""Tells for which kind of chip tensors are computed, and in which dtype it multiplies matrices that are stored in a given dtype.

Storing bfloat16 and multiplying in float32 gives the same result as a bfloat16 unit that accumulates in float32, because products
of bfloat16 numbers are exact in float32. A CPU without bfloat16 instructions runs the 16-bit path several times slower than
float32 (docs/performance.md), so there the operands are widened before the multiplication and the result is rounded.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

HALF = (torch.bfloat16, torch.float16)
_CPU = torch.cpu.get_capabilities()
_CPU_MULTIPLIES = {
    torch.bfloat16: bool(_CPU.get("amx_bf16") or _CPU.get("avx512_bf16")),
    torch.float16: bool(_CPU.get("amx_fp16") or _CPU.get("avx512_fp16")),
}


def chip_of(device: torch.device) -> str:
    """Returns the type of the device that computes with tensors on `device`: "cpu", "cuda" or that of another accelerator.

    Tensors on the meta device have no values and stand for those of another device, which the dispatch mode around the computation
    names in its attribute `chip`; without such a mode, returns "meta".
    """
    if device.type != "meta":
        return device.type
    return str(getattr(_get_current_dispatch_mode(), "chip", "meta"))


def dispatch_mode() -> Any:
    """Returns the innermost dispatch mode around the computation, which sees each of its operations; None if there is none."""
    return _get_current_dispatch_mode()


def multiply_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Returns the dtype to which operands like `tensor` are cast before a matrix product: their own, unless widening is faster."""
    if chip_of(tensor.device) == "cpu" and not _CPU_MULTIPLIES.get(tensor.dtype, True):
        return torch.float32
    return tensor.dtype


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns `dtype`, widened to at least float32: for norms, softmax, losses and routers."""
    return torch.float32 if dtype in HALF else dtype


def on_nvidia(tensor: torch.Tensor) -> bool:
    """Returns whether `tensor` is on an NVIDIA GPU that multiplies bfloat16 (Ampere or later). torch says "cuda" for AMD GPUs as
    well."""
    if tensor.is_meta:
        return chip_of(tensor.device) == "cuda"
    return tensor.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
