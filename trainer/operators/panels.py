"""The matrix products of linear layers by kernels in C++ (panels.cpp), for CPUs that do not multiply bfloat16 matrices.

They add up in float32, and read operands in float32 or bfloat16 where these lie.

Shapes: N rows, I input width, O output width.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch

from bagualu.parallel.precision import multiply_dtype
from bagualu.parallel.products import Products
from bagualu.trainer.operators.cpp_kernels import AVX2, CppKernels, address, message_of, sizes_of, with_rows

_DTYPES = (torch.float32, torch.bfloat16)


class ProductsInPanels(CppKernels, Products):
    """A variant of the operator `linear`: rows, columns, weights, results and gradients may be float32 or bfloat16 each, and sums
    are float32. torch's functions compute those products that the kernels do not."""

    source = Path(__file__).with_suffix(".cpp")
    name = "linear layers in panels"
    instructions = AVX2

    def try_out(self, library: ctypes.CDLL) -> str | None:
        tried = torch.zeros(1, 1)
        return message_of(library.linear_outputs, *sizes_of(1, 1, 1), *[_matrix(tried)] * 2, None, _matrix(tried))

    def computes(self, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> bool:
        quicker = dtype == torch.float32 or multiply_dtype(torch.empty(0, dtype=dtype)) == torch.float32
        return dtype in _DTYPES and quicker and min(rows, inputs, outputs) > 0

    def operand(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x if dtype in _DTYPES and self._reads(x) else super().operand(x, dtype)

    def outputs(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        if not self._reads(rows, weight, bias, into):
            return super().outputs(rows, weight, bias, into, dtype)
        flat, added = with_rows(rows.reshape(-1, rows.shape[-1])), None if bias is None else bias.float().contiguous()
        result = flat.new_empty(len(flat), len(weight), dtype=dtype) if into is None else into
        where = None if added is None else address(added)
        sizes = sizes_of(len(flat), *weight.shape)
        self.run("linear_outputs", *sizes, _matrix(flat), _matrix(with_rows(weight)), where, _matrix(result))
        return result.view(*rows.shape[:-1], len(weight))

    def plus_input_gradient(
        self, total: torch.Tensor | None, columns: torch.Tensor, weight: torch.Tensor, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        result = into if total is None else total
        if not self._reads(columns, weight, result):
            return super().plus_input_gradient(total, columns, weight, into)
        columns, weight, sizes = with_rows(columns), with_rows(weight), sizes_of(len(columns), *weight.shape)
        result = columns.new_empty(len(columns), weight.shape[1]) if result is None else result
        self.run("input_gradient", *sizes, _matrix(columns), _matrix(weight), total is not None, _matrix(result))
        return result

    def add_weight_gradient(self, total: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor, fresh: bool) -> None:
        if not (self._reads(total, columns, rows) and total.stride(1) == 1):
            return super().add_weight_gradient(total, columns, rows, fresh)
        columns, rows, sizes = with_rows(columns), with_rows(rows), sizes_of(len(rows), *total.shape)
        self.run("weight_gradient", *sizes, _matrix(columns), _matrix(rows), not fresh, _matrix(total))
        return None

    def _reads(self, *tensors: torch.Tensor | None) -> bool:
        """Returns whether the kernels read these tensors, none of them empty."""
        return all(x is None or _is_plain(x) for x in tensors) and self.library is not None


products_in_panels = ProductsInPanels()


def _is_plain(x: torch.Tensor) -> bool:
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.dtype in _DTYPES and x.device.type == "cpu" and x.numel() > 0


def _matrix(x: torch.Tensor) -> Any:
    """Returns a Matrix of panels.cpp."""
    return (ctypes.c_int64 * 3)(x.data_ptr(), x.stride(0), x.dtype == torch.bfloat16)
