"""Model FLOPs, and what this machine's matrix multiplication reaches: the two sides of MFU.

MFU = model_flops_per_token x tokens per second / sum of the ranks' ceilings.

The convention is that of models/flops.py; recomputation never counts.
"""

import time

import torch
from torch import Tensor

from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.flops import head_flops, layer_flops

_SMALLEST, _LARGEST = 256, 8192
_LONG_ENOUGH_SECONDS = 0.01


def model_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token of a sequence of `sequence_length`."""
    layers = sum(layer_flops(model, layer, sequence_length).total for layer in range(model.layers))
    return layers + head_flops(model).total


def matmul_ceiling(dtype: torch.dtype, device: torch.device, threads: int, budget_seconds: float = 0.2) -> float:
    """FLOP/s that square matrix products of `dtype` reach here, best of several within about `budget_seconds`.

    `threads` is the number of CPU threads to use; it has no effect on accelerators. Call it on every rank at the same
    time and add the results up: ranks that share a machine share its ceiling too.

    A CPU without instructions for a 16-bit type computes it through float32, and sometimes slower than a program that
    converted by itself would; so float32 is tried as well and the better one counts.
    """
    dtypes = [dtype]
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        dtypes.append(torch.float32)
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(threads)
    try:
        return max(_best_rate(each, device, budget_seconds / len(dtypes)) for each in dtypes)
    finally:
        if device.type == "cpu":
            torch.set_num_threads(before)


@torch.no_grad()
def _best_rate(dtype: torch.dtype, device: torch.device, budget_seconds: float) -> float:
    started = time.perf_counter()
    size, seconds = _SMALLEST, 0.0
    while True:
        a, b, out = _operands(size, dtype, device)
        seconds = min(_seconds(a, b, out) for _ in range(3))  # the first product pays for pages and kernels
        left = budget_seconds - (time.perf_counter() - started)
        if size >= _LARGEST or seconds >= _LONG_ENOUGH_SECONDS or 3 * 8 * seconds > left:
            break
        size *= 2
    while time.perf_counter() - started < budget_seconds:
        seconds = min(seconds, _seconds(a, b, out))
    return 2.0 * size * size * size / seconds


def _operands(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # Random values: an accelerator multiplies constant ones faster than any training, because they take less power.
    a, b = (torch.rand(size, size, dtype=dtype, device=device) for _ in range(2))
    return a, b, torch.empty_like(a)


def _seconds(a: Tensor, b: Tensor, out: Tensor) -> float:
    synchronize(a.device)
    started = time.perf_counter()
    torch.mm(a, b, out=out)
    synchronize(a.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
