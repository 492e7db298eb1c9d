"""The matrix products of linear layers. Shapes: N rows, I input width, O output width."""

import torch
import torch.nn.functional as F

from bagualu.parallel.precision import on_nvidia
from bagualu.parallel.product_shapes import meet


class Products:
    """The products of the forward and the backward pass, by torch's functions. A variant of the operator `linear` is an object of
    this class or of a subclass.

    Rows are multiplied in their dtype, to which a weight in another one is cast.
    """

    in_groups = True
    """Whether torch's kernel for all experts together may take the place of a product for each expert."""

    of_rows: torch.dtype | None = None
    """The float8 dtype to which rows and weights are rounded before they are multiplied; None if they are not."""
    of_gradients: torch.dtype | None = None
    """The same for gradients of outputs."""

    def operand(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns `x` as the methods below take it: in `dtype`, in which this device multiplies numbers like those of the weights.
        A subclass that reads other dtypes need not cast it."""
        return x.to(dtype)

    @property
    def without_float8(self) -> "Products":
        """The products that do not round operands more than their dtype does: for the projection to the vocabulary, and for models
        that are not trained any more."""
        return self

    def computes(self, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> bool:
        """Returns whether this class has functions of its own for such a layer. Else a run does not measure it."""
        return True

    def outputs(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Returns rows [..., I] @ weight.T plus bias [O], given weight [O, I], as [..., O] in `dtype`, by default the rows'. If
        `into` [N, O] is given, there is no bias, and the result is written there."""
        meet(rows.numel() // rows.shape[-1], weight)
        if into is not None:
            return torch.mm(rows, weight.T.to(rows.dtype), out=into)
        return F.linear(rows, weight.to(rows.dtype), bias).to(dtype or rows.dtype)

    def plus_input_gradient(
        self, total: torch.Tensor | None, columns: torch.Tensor, weight: torch.Tensor, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns columns [N, O] @ weight, the gradient [N, I] of a layer's input given that of its output, written to `into` if
        given; with `total` [N, I], adds it to that."""
        weight = weight.to(columns.dtype)
        return torch.mm(columns, weight, out=into) if total is None else total.addmm_(columns, weight)

    def add_weight_gradient(self, total: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor, fresh: bool) -> None:
        """Adds columns.T @ rows, given columns [N, O] and rows [N, I], to total [O, I], or overwrites it if `fresh`. The product is
        neither rounded nor copied, if torch can do so."""
        left = columns.T
        if left.dtype == total.dtype:
            torch.addmm(total, left, rows, beta=0 if fresh else 1, out=total)
        elif on_nvidia(total):  # its matrix product can return the float32 sums before they are rounded
            torch.addmm(total, left, rows, out_dtype=total.dtype, beta=0 if fresh else 1, out=total)
        elif fresh:
            total.copy_(left @ rows)
        else:
            total.add_(left @ rows)


torch_products = Products()
