"""Computes a model's FLOPs and measures the FLOP/s that matrix multiplication reaches on this machine. MFU relates the two:

MFU = model_flops_per_token x tokens per second / sum of the ranks' ceilings.

FLOPs are counted as in models/decoder/flops.py; recomputation never counts.
"""

import time

import torch
from torch import Tensor

_SMALLEST, _LARGEST = 256, 8192
_LONG_ENOUGH_SECONDS = 0.01


def matmul_ceiling(dtype: torch.dtype, device: torch.device, threads: int, budget_seconds: float = 0.2) -> float:
    """Returns the FLOP/s that square matrix products of `dtype` reach on `device`: the best of several in about `budget_seconds`.

    `threads` is the number of CPU threads to use; it has no effect on accelerators. Call this on every rank at the same
    time and sum the results, because ranks on the same machine share its ceiling.

    A CPU without instructions for a 16-bit type converts to float32 internally, sometimes more slowly than a program that converts
    explicitly. So float32 is measured as well and the higher rate counts.
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
        seconds = min(_seconds(a, b, out) for _ in range(3))  # the first also pays for page faults and loading kernels
        left = budget_seconds - (time.perf_counter() - started)
        if size >= _LARGEST or seconds >= _LONG_ENOUGH_SECONDS or 3 * 8 * seconds > left:
            break
        size *= 2
    while time.perf_counter() - started < budget_seconds:
        seconds = min(seconds, _seconds(a, b, out))
    return 2.0 * size * size * size / seconds


def _operands(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # Random values: an accelerator multiplies constants faster than real values, because they take less power.
    a, b = (torch.rand(size, size, dtype=dtype, device=device) for _ in range(2))
    return a, b, torch.empty_like(a)


def _seconds(a: Tensor, b: Tensor, out: Tensor) -> float:
    synchronize(a.device)
    started = time.perf_counter()
    torch.mm(a, b, out=out)
    synchronize(a.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Waits until `device` has finished all work submitted to it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
