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
from bagualu.trainer.operators.cpp_kernels import AVX2, CppKernels, address, have_sizes, message_of, sizes_of, with_rows

_DTYPES = (torch.float32, torch.bfloat16)
_LEAST_ROWS = 8
"""For fewer rows, packing a weight takes longer than the product, and a run does not measure it."""


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
        if dtype == torch.float32:
            quicker = not torch.cpu.get_capabilities().get("avx512_f")  # which torch's products use
        else:
            quicker = dtype == torch.bfloat16 and multiply_dtype(torch.empty(0, dtype=dtype)) == torch.float32
        return quicker and rows >= _LEAST_ROWS and min(inputs, outputs) > 0

    def operand(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x if dtype in _DTYPES and _is_plain(x) and self.library is not None else super().operand(x, dtype)

    def outputs(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        fits = bias is None or bias.shape == weight.shape[:1]
        if not (fits and self._multiplies((len(flat), *weight.shape), into, rows=flat, weight=weight, columns=into)):
            alike, same = _in_one_dtype(rows, weight)
            found = super().outputs(alike, same, None if bias is None else bias.to(alike.dtype), dtype=dtype or rows.dtype)
            return found if into is None else into.copy_(found)
        result = flat.new_empty(len(flat), len(weight), dtype=dtype) if into is None else into
        added = None if bias is None else bias.float().contiguous()
        flat, weight = with_rows(flat), with_rows(weight)
        sizes, where = sizes_of(len(flat), *weight.shape), None if added is None else address(added)
        self.run("linear_outputs", *sizes, _matrix(flat), _matrix(weight), where, _matrix(result))
        return result.view(*rows.shape[:-1], len(weight))

    def plus_input_gradient(
        self, total: torch.Tensor | None, columns: torch.Tensor, weight: torch.Tensor, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        result = into if total is None else total
        if not self._multiplies((len(columns), *weight.shape), result, rows=result, weight=weight, columns=columns):
            found = super().plus_input_gradient(None, *_in_one_dtype(columns, weight)).to(columns.dtype)
            if result is None:
                return found
            return result.copy_(found) if total is None else result.add_(found)
        result = columns.new_empty(len(columns), weight.shape[1]) if result is None else result
        columns, weight = with_rows(columns), with_rows(weight)
        sizes = sizes_of(len(columns), *weight.shape)
        self.run("input_gradient", *sizes, _matrix(columns), _matrix(weight), total is not None, _matrix(result))
        return result

    def add_weight_gradient(self, total: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor, fresh: bool) -> None:
        if not self._multiplies((len(rows), *total.shape), total, rows=rows, columns=columns):
            return super().add_weight_gradient(total, *_in_one_dtype(columns, rows), fresh)
        columns, rows = with_rows(columns), with_rows(rows)
        sizes = sizes_of(len(rows), *total.shape)
        self.run("weight_gradient", *sizes, _matrix(columns), _matrix(rows), not fresh, _matrix(total))
        return None

    def _multiplies(self, sizes: tuple[int, ...], result: torch.Tensor | None, **matrices: torch.Tensor | None) -> bool:
        """Returns whether the kernels multiply these rows [N, I], columns [N, O] and weight [O, I], of the sizes (N, O, I), and
        write to `result`, if it is given."""
        return (
            have_sizes(sizes, **matrices)
            and all(x is None or _is_plain(x) for x in (result, *matrices.values()))
            and (result is None or result.stride(-1) == 1)
            and self.library is not None
        )


products_in_panels = ProductsInPanels()


def _in_one_dtype(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both in the wider of their dtypes, as torch's products want them."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return one.to(dtype), other.to(dtype)


def _is_plain(x: torch.Tensor) -> bool:
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.dtype in _DTYPES and x.device.type == "cpu" and x.numel() > 0


def _matrix(x: torch.Tensor) -> Any:
    """Returns a Matrix of panels.cpp."""
    return (ctypes.c_int64 * 3)(x.data_ptr(), x.stride(0), x.dtype == torch.bfloat16)
