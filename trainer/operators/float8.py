"""The matrix products of linear layers in float8, for runs with train.dtype=float8.

Before a product, each of its two matrices is divided by scales, so that its largest number becomes the largest that float8 has, and
is rounded to float8. The product's sums are float32; the scales are multiplied in afterwards. Scales are computed anew for each
product ("dynamic scaling"). Matrices are stored in bfloat16 before and after; gradients of weights are float32.

float8_rowwise: a scale for each row of the left matrix and each column of the right one, so that a large number costs only its own
row its precision. All matrices are in e4m3 (4 bits of exponent, 3 of mantissa): with a scale for so few numbers, precision matters
more than range, also for gradients (DeepSeek-V3, arXiv 2412.19437, section 3.3.2; torchao's recipe "rowwise").
float8_tensorwise: one scale for each matrix, which is cheaper. Gradients, whose numbers spread over more powers of two, are in
e5m2; the other matrices are in e4m3 (FP8 Formats for Deep Learning, arXiv 2209.05433, section 3).

Shapes: N rows, I input width, O output width, A rows of any matrix, K the width over which a product adds up.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import ScalingType, scaled_mm

from bagualu.parallel.precision import multiply_dtype
from bagualu.parallel.products import Products, torch_products
from bagualu.trainer.operators.registry import FLOAT8_MULTIPLE

_LEAST_SCALE = 2.0**-100
"""The scale of numbers so small that dividing by their own might overflow, and of zeros."""
_LEAST_CAPABILITY = (8, 9)
"""NVIDIA's compute capability with which float8 products began: Ada; Hopper, 9.0, is next."""
_AMD = ("gfx95", "gfx12")
"""The beginnings of the names of AMD's architectures that multiply the formats used here. gfx94 has others, of half the range."""
_READ = (torch.bfloat16, torch.float32)
"""Dtypes of matrices that are rounded to float8. Some that belong to weights in bfloat16 are float32 on CPUs."""
_KEPT = "float8"
"""The name of the attribute of an operand that holds what it has been converted to."""


@dataclass(frozen=True)
class Scaled:
    """A matrix in float8 that stands for values * scale."""

    values: torch.Tensor
    """[A, K], with elements of a row side by side; K is padded with zeros to a multiple of FLOAT8_MULTIPLE."""
    scale: torch.Tensor
    """float32: [A, 1], or [] for the whole matrix."""


def scaled(x: torch.Tensor, dtype: torch.dtype, by_row: bool) -> Scaled:
    """Rounds x [A, K] to the float8 `dtype`. Infinities and NaN make all numbers that share their scale NaN, or their scale
    infinite, so that products of them are NaN."""
    highest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True) if by_row else torch.linalg.vector_norm(x, torch.inf)
    scale = (highest.float() / torch.finfo(dtype).max).clamp(min=_LEAST_SCALE)  # NaN stays NaN
    width = x.shape[1]
    values = x.new_empty(len(x), -(-width // FLOAT8_MULTIPLE) * FLOAT8_MULTIPLE, dtype=dtype)
    values[:, :width].copy_(x / scale.expand(len(x), 1))  # divided in float32; within float8's range
    if values.shape[1] > width:
        values.view(torch.uint8)[:, width:].zero_()
    return Scaled(values, scale)


def multiply(left: Scaled, right: Scaled, dtype: torch.dtype) -> torch.Tensor:
    """Returns the product [A, B] in `dtype`, bfloat16 or float32, of left [A, K] and the transposed right [B, K]."""
    if left.scale.dim() and dtype == torch.float32:  # GPUs return products with a scale for each row only in bfloat16
        whole = left.scale.new_ones(())
        return _multiply(left.values, right.values, whole, whole, dtype).mul_(left.scale).mul_(right.scale.T)
    if left.scale.dim():
        return scaled_mm(
            left.values, right.values.T, left.scale, ScalingType.RowWise, right.scale.T, ScalingType.RowWise, output_dtype=dtype
        )
    return _multiply(left.values, right.values, left.scale, right.scale, dtype)


def _multiply(
    left: torch.Tensor, right: torch.Tensor, of_left: torch.Tensor, of_right: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Returns left [A, K] @ right.T [K, B] times two scalars, without the option of GPUs to add up in fewer bits than float32."""
    kind = ScalingType.TensorWise
    return scaled_mm(left, right.T, of_left, kind, of_right, kind, output_dtype=dtype)


class ProductsInFloat8(Products):
    """A variant of the operator `linear`, of weights in bfloat16. torch's functions compute products whose widths are not multiples
    of FLOAT8_MULTIPLE, in bfloat16."""

    in_groups = False
    of_rows: torch.dtype = torch.float8_e4m3fn
    of_gradients: torch.dtype

    def __init__(self, by_row: bool) -> None:
        """`by_row`: whether each row and column has a scale of its own, rather than each matrix."""
        self._by_row = by_row
        self.of_gradients = torch.float8_e4m3fn if by_row else torch.float8_e5m2

    @property
    def without_float8(self) -> Products:
        return torch_products

    def lacks_on(self, chip: str) -> str | None:
        """Returns what these products need and this machine has not, for runs on `chip`; None if nothing."""
        if chip == "cpu":
            return None
        if chip != "cuda":
            return self._refusal(chip)
        if torch.version.hip is not None:
            name = torch.cuda.get_device_properties().gcnArchName
            return None if name.startswith(_AMD) else "a GPU that multiplies float8 in the formats e4m3fn and e5m2 (MI350 or later)"
        if torch.cuda.get_device_capability() >= _LEAST_CAPABILITY:
            return None
        return "a GPU that multiplies float8 (NVIDIA's of compute capability 8.9 or later, as L40S or H100)"

    def _refusal(self, chip: str) -> str | None:
        """Returns what a small product of each kind lacks on `chip`, by torch's own words; None if they are computed."""
        try:
            x = torch.ones(FLOAT8_MULTIPLE, FLOAT8_MULTIPLE, dtype=torch.bfloat16, device=chip)
            right = scaled(x, torch.float8_e4m3fn, self._by_row)
            for dtype in {torch.float8_e4m3fn, self.of_gradients}:
                for result in _READ:
                    multiply(scaled(x, dtype, self._by_row), right, result)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return f"products in float8 on the chip {chip} ({reason})"
        return None

    def operand(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if x.dtype not in _READ or dtype not in _READ:
            return super().operand(x, dtype)
        operand = x.view(x.shape)  # an object of its own, which lives as long as the layer's products need it
        setattr(operand, _KEPT, {})
        return operand

    def computes(self, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> bool:
        aligned = inputs % FLOAT8_MULTIPLE == outputs % FLOAT8_MULTIPLE == 0
        return dtype == torch.bfloat16 and min(rows, inputs, outputs) > 0 and aligned

    def outputs(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        result = into.dtype if into is not None else dtype or rows.dtype
        if not self._narrows((rows, weight), rows.numel() // max(1, rows.shape[-1]), *weight.shape):
            alike, same = _alike(rows, weight)
            found = super().outputs(alike, same, None if bias is None else bias.to(alike.dtype), dtype=result)
        else:
            left = self._kept(rows, "rows", rows.reshape(-1, rows.shape[-1]))
            found = multiply(left, scaled(weight, torch.float8_e4m3fn, self._by_row), _returned(result)).to(result)
            found = (found if bias is None else found.add_(bias)).view(*rows.shape[:-1], len(weight))
        return found if into is None else into.copy_(found)

    def plus_input_gradient(
        self, total: torch.Tensor | None, columns: torch.Tensor, weight: torch.Tensor, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not self._narrows((columns, weight), len(columns), *weight.shape):
            found = super().plus_input_gradient(None, *_alike(columns, weight)).to(columns.dtype)
        else:
            left = scaled(columns, self.of_gradients, self._by_row)
            found = multiply(left, scaled(weight.T, torch.float8_e4m3fn, self._by_row), _returned(columns.dtype))
        if total is not None:
            return total.add_(found)
        return found if into is None else into.copy_(found)

    def add_weight_gradient(self, total: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor, fresh: bool) -> None:
        if not self._narrows((columns, rows), len(rows), *total.shape):
            super().add_weight_gradient(total, *_alike(columns, rows), fresh)
        else:
            right = self._kept(rows, "columns", rows.T)
            found = multiply(scaled(columns.T, self.of_gradients, self._by_row), right, torch.float32)
            total.copy_(found) if fresh else total.add_(found)

    def _narrows(self, factors: tuple[torch.Tensor, torch.Tensor], rows: int, outputs: int, inputs: int) -> bool:
        """Returns whether a product of two of rows [N, I], columns [N, O] and weight [O, I] is computed in float8."""
        dtypes = [factor.dtype for factor in factors]
        mixed = torch.bfloat16 in dtypes and all(dtype in _READ for dtype in dtypes)
        return mixed and self.computes(torch.bfloat16, rows, inputs, outputs)

    def _kept(self, operand: torch.Tensor, key: str, x: torch.Tensor) -> Scaled:
        """Returns x [A, K], the operand or its transposed, in float8. The conversion is kept with what `operand` has returned, for
        the other products of the layer; tensors that it has not seen may change between two products."""
        kept: dict[str, Scaled] | None = getattr(operand, _KEPT, None)
        if kept is None:
            return scaled(x, torch.float8_e4m3fn, self._by_row)
        if key not in kept:
            kept[key] = scaled(x, torch.float8_e4m3fn, self._by_row)
        return kept[key]


float8_rowwise = ProductsInFloat8(by_row=True)
float8_tensorwise = ProductsInFloat8(by_row=False)


def _returned(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which a product is returned that is rounded to `dtype` afterwards."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _alike(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both in the wider of their dtypes or, if this device multiplies numbers like these faster in another, in that."""
    wider = one if torch.promote_types(one.dtype, other.dtype) == one.dtype else other
    dtype = multiply_dtype(wider)
    return one.to(dtype), other.to(dtype)
