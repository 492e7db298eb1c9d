"""The matrix products of linear layers by kernels in C++ (products.cpp), for CPUs that multiply bfloat16 matrices.

Shapes: N rows, I input width, O output width.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch

from bagualu.parallel.products import Products
from bagualu.trainer.operators.cpp_kernels import AVX512_BF16, CppKernels, address, have_sizes, message_of, sizes_of, with_rows

_MULTIPLE = 32
"""Widths have to be multiples of this (kStep in products.cpp)."""
_LEAST_ROWS = 32
"""For fewer rows, packing a weight takes longer than the product."""


class ProductsInTiles(CppKernels, Products):
    """A variant of the operator `linear`: of products in bfloat16. torch's functions compute those that the kernels do not."""

    source = Path(__file__).with_suffix(".cpp")
    name = "linear layers in tiles"
    instructions = AVX512_BF16

    def try_out(self, library: ctypes.CDLL) -> str | None:
        tried = torch.zeros(_LEAST_ROWS, _MULTIPLE, dtype=torch.bfloat16)
        return message_of(library.linear_outputs, *sizes_of(*tried.shape, _MULTIPLE), *[_matrix(tried)] * 2, None, _matrix(tried))

    def outputs(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        sizes = len(flat), *weight.shape
        plain = bias is None or (bias.dtype == rows.dtype and bias.shape == weight.shape[:1] and bias.stride(0) == 1)
        if not (plain and self._takes(*sizes, rows=flat, weight=weight, columns=into)):
            return super().outputs(rows, weight, bias, into, dtype)
        result = flat.new_empty(len(flat), len(weight)) if into is None else into
        added = None if bias is None else address(bias)
        self.run("linear_outputs", *sizes_of(*sizes), _matrix(flat), _matrix(weight), added, _matrix(result))
        return result.view(*rows.shape[:-1], len(weight)).to(dtype or rows.dtype)

    def plus_input_gradient(
        self, total: torch.Tensor | None, columns: torch.Tensor, weight: torch.Tensor, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        columns, result = with_rows(columns), into if total is None else total
        sizes = len(columns), *weight.shape
        if not self._takes(*sizes, rows=result, weight=weight, columns=columns):
            return super().plus_input_gradient(total, columns, weight, into)
        result = columns.new_empty(len(columns), weight.shape[1]) if result is None else result
        self.run("input_gradient", *sizes_of(*sizes), _matrix(columns), _matrix(weight), total is not None, _matrix(result))
        return result

    def add_weight_gradient(self, total: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor, fresh: bool) -> None:
        columns, rows, sizes = with_rows(columns), with_rows(rows), (len(rows), *total.shape)
        wide = total.dtype == torch.float32 and total.is_contiguous()
        if not (wide and self._takes(*sizes, rows=rows, columns=columns)):
            return super().add_weight_gradient(total, columns, rows, fresh)
        self.run("weight_gradient", *sizes_of(*sizes), _matrix(columns), _matrix(rows), address(total), not fresh)
        return None

    def computes(self, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> bool:
        fits = rows >= _LEAST_ROWS and outputs > 0 < inputs  # with a width of 0 there is nothing to add up
        return fits and dtype == torch.bfloat16 and outputs % _MULTIPLE == inputs % _MULTIPLE == 0

    def _takes(self, tokens: int, outputs: int, inputs: int, **matrices: torch.Tensor | None) -> bool:
        """Returns whether the kernels multiply these matrices: rows [N, I], columns [N, O] and weight [O, I]."""
        return (
            self.computes(torch.bfloat16, tokens, inputs, outputs)
            and have_sizes((tokens, outputs, inputs), **matrices)
            and all(x is None or _lies_in_rows(x) for x in matrices.values())
            and self.library is not None
        )


products_in_tiles = ProductsInTiles()


def _lies_in_rows(x: torch.Tensor) -> bool:
    plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    return plain and x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.stride(-1) == 1


def _matrix(x: torch.Tensor) -> Any:
    """Returns a Matrix of products.cpp."""
    return (ctypes.c_int64 * 2)(x.data_ptr(), x.stride(0))
