"""Attention with linear biases (ALiBi, arXiv 2108.12409): scores fall with the distance of the key, by a slope of each head.

Shapes: B batch, A query heads, G key heads, S sequence, D head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from bagualu.parallel.precision import accurate_dtype

BASE = 2**8
"""Positions are given in two digits of this base, which bfloat16 and float16 hold exactly."""
ADDED_WIDTH = 8
"""Elements that `extended` adds to a head's width. Kernels of GPUs want widths that are multiples of 8."""


class Slopes(nn.Module):
    """Returns, when called, the slopes of this rank's heads, in at least float32. It keeps only the latest result."""

    def __init__(self, heads: int) -> None:
        """`heads`: of the whole model."""
        super().__init__()
        self.heads = heads
        self.first = 0
        """The number of this rank's first head."""
        self._kept: dict[tuple[int, torch.dtype, torch.device], torch.Tensor] = {}

    def forward(self, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Returns the slopes [count] of this rank's `count` heads. Head i (from 0) of a power of two of n heads has 2^(-8 (i + 1) /
        n). Of other numbers, as many heads as the power of two below have these slopes, and the others every second slope of the
        power of two above (as in the authors' code)."""
        key = (count, dtype, device)
        if key not in self._kept:
            head = torch.arange(self.first, self.first + count, dtype=torch.float64, device=device)
            below = 2 ** (self.heads.bit_length() - 1)
            exponents = torch.where(head < below, head + 1, head - below + 0.5) * (-8 / below)
            self._kept = {key: exponents.exp2().to(accurate_dtype(dtype))}
        return self._kept[key]


def distances(queries: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    """Returns the position of each key minus that of each query [queries, keys], where the queries are the last of `keys` tokens,
    in the dtype and on the device of `like`."""
    positions = torch.arange(keys, dtype=like.dtype, device=like.device)
    return positions - positions[-queries:].unsqueeze(1)


def extended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns query [B, A, S, D], key and value [B, G, S, D] with wider heads, for a kernel that knows no biases and scales scores
    by 1 / sqrt(D): of its output, the first D elements are those of attention with `slopes` [A].

    The added elements multiply to slope * sqrt(D) * (position of the key). This differs from the bias by the same amount for all
    keys of a query, which softmax takes out. In 16 bits, both factors are sums of two numbers, so that positions are exact and
    slopes as good as exact.
    """
    width, dtype = query.shape[-1], query.dtype
    exact = slopes * math.sqrt(width)
    rounded = exact.to(dtype)
    rest = (exact - rounded).to(dtype)
    positions = torch.arange(key.shape[2], device=key.device)
    digits = torch.stack((positions // BASE * BASE, positions % BASE), -1).to(dtype)  # [S, 2]
    factors = torch.stack((rounded, rounded, rest, rest), -1).unsqueeze(1)  # [A, 1, 4]
    return (
        torch.cat((query, _padded(factors).expand(*query.shape[:3], ADDED_WIDTH)), -1),
        torch.cat((key, _padded(torch.cat((digits, digits), -1)).expand(*key.shape[:3], ADDED_WIDTH)), -1),
        F.pad(value, (0, ADDED_WIDTH)),
    )


def _padded(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, ADDED_WIDTH - x.shape[-1]))
