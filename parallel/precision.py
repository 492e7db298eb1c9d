"""Which dtype this chip multiplies matrices in, for tensors stored in a given dtype.

Storing bfloat16 and multiplying in float32 is the same mathematics as a bfloat16 unit with float32 accumulation (products of
bfloat16 numbers are exact in float32). A CPU without bfloat16 instructions runs the 16-bit path several times slower than
float32 (docs/performance.md), so there the operands are widened for the multiplication and the result is rounded.
"""

import torch

HALF = (torch.bfloat16, torch.float16)
_CPU = torch.cpu.get_capabilities()
_CPU_MULTIPLIES = {
    torch.bfloat16: bool(_CPU.get("amx_bf16") or _CPU.get("avx512_bf16")),
    torch.float16: bool(_CPU.get("amx_fp16") or _CPU.get("avx512_fp16")),
}


def multiply_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype to cast operands like `tensor` to before a matrix multiplication; its own unless widening is faster."""
    if tensor.device.type == "cpu" and not _CPU_MULTIPLIES.get(tensor.dtype, True):
        return torch.float32
    return tensor.dtype


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32: for norms, softmax, losses, routers."""
    return torch.float32 if dtype in HALF else dtype


def on_nvidia(tensor: torch.Tensor) -> bool:
    """Whether it lies on a GPU of NVIDIA's that multiplies bfloat16 (Ampere or later); torch says "cuda" for AMD's too."""
    return tensor.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
