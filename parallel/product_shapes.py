"""Counts the shapes of matrix products that this process meets for the first time.

On a CPU the library of 16-bit products generates code for each shape that it has not met before, which may take longer than the
product. A run whose steps go on meeting new shapes is slow for that reason alone.
"""

import torch

from bagualu.parallel.precision import HALF, chip_of, multiply_dtype

_met: set[tuple[int, int, int, torch.dtype]] = set()


def generates_code(x: torch.Tensor) -> bool:
    """Returns whether the library that multiplies tensors of x's dtype and device generates code for each new shape."""
    return chip_of(x.device) == "cpu" and x.dtype in HALF and multiply_dtype(x) == x.dtype


def meet(rows: int, weight: torch.Tensor) -> None:
    """Notes a product of so many rows with a matrix `weight` [..., O, I], if code is generated for its shape."""
    if rows and generates_code(weight):
        _met.add((rows, weight.shape[-2], weight.shape[-1], weight.dtype))


def met() -> int:
    """Returns the number of different shapes met since the process began, by all ranks that are its threads."""
    return len(_met)
