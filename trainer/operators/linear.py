"""Linear layers with a single weight or a weight for each expert, written so that the same code is fast on every chip.

Shapes: N rows, I input width, O output width, E experts.

Matrix multiplications run in `multiply_dtype`, unless `Products` reads operands as they are; gradients of weights are added in at
least float32. Several linear layers with the same input are one operation: the input is saved and converted once, and its gradient
is accumulated in place.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from bagualu.parallel.data.reducer import GradientSink, gradient_sink
from bagualu.parallel.precision import accurate_dtype, multiply_dtype, on_nvidia
from bagualu.parallel.products import Products, torch_products
from bagualu.trainer.operators.packed import multiply_packed

_GROUPED_MULTIPLE = 8
"""The kernel for several experts needs rows of a multiple of this many elements: 16 bytes of bfloat16."""


def linears(
    x: torch.Tensor,
    *weights: torch.Tensor,
    biases: Sequence[torch.Tensor | None] = (),
    factor: torch.Tensor | None = None,
    wide: bool = False,
    dtype: torch.dtype | None = None,
    products: Products = torch_products,
) -> tuple[torch.Tensor, ...]:
    """Multiplies x [..., I] by each weight [O, I], and adds its bias [O] if it has one; returns an output [..., O] for each, in the
    weights' dtype. `biases`: one for each weight, or none at all.

    With `factor`, of x's shape, the input is x * factor, a product that is computed again in the backward pass instead of saved.
    `dtype` is that of the multiplication, by default `multiply_dtype`. With `wide`, outputs stay in that dtype, for callers that
    continue to compute in it. Without gradients, weights may be packed (packed.py). `products` computes the matrix products.
    """
    dtype = dtype or multiply_dtype(weights[0])
    if not torch.is_grad_enabled():  # a function of autograd takes as long as a small product
        return _outputs(products, wide, dtype, x, factor, weights, biases)
    outputs: tuple[torch.Tensor, ...] = _Linears.apply(products, wide, dtype, len(weights), x, factor, *weights, *biases)
    return outputs


def _outputs(
    products: Products,
    wide: bool,
    dtype: torch.dtype,
    x: torch.Tensor,
    factor: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, ...]:
    """Returns what `linears` does, without a record for a backward pass."""
    rows, outputs = products.operand(_times(x, factor), dtype), []
    for weight, bias in zip(weights, biases or (None,) * len(weights), strict=True):
        added, result = None if bias is None else bias.to(dtype), dtype if wide else weight.dtype
        if weight.is_mkldnn:
            outputs.append(multiply_packed(rows.to(dtype), weight, added).to(result))
        else:
            outputs.append(products.outputs(rows, weight, added, dtype=result))
    return tuple(outputs)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        products: Products,
        wide: bool,
        dtype: torch.dtype,
        count: int,
        x: torch.Tensor,
        factor: torch.Tensor | None,
        *given: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        weights, biases = given[:count], given[count:]
        ctx.save_for_backward(x, factor, *weights)
        ctx.products, ctx.dtype, ctx.sinks = products, dtype, [gradient_sink(weight) for weight in weights]
        return _outputs(products, wide, dtype, x, factor, weights, biases)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, factor, *weights = ctx.saved_tensors
        products, dtype = ctx.products, ctx.dtype
        rows = products.operand(_times(x, factor).reshape(-1, x.shape[-1]), dtype)
        grad_rows: torch.Tensor | None = None
        needed, count = ctx.needs_input_grad[6:], len(weights)
        grad_weights: list[torch.Tensor | None] = []
        grad_biases: list[torch.Tensor | None] = [None] * (len(needed) - count)
        for index, (grad, weight, sink) in enumerate(zip(grads, weights, ctx.sinks, strict=True)):
            columns = products.operand(grad.reshape(-1, grad.shape[-1]), dtype)
            grad_weights.append(_weight_gradient(products, sink, weight, [columns], [rows]) if needed[index] else None)
            if grad_biases and needed[count + index]:
                grad_biases[index] = _sum_of_rows(columns)
            if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
                grad_rows = products.plus_input_gradient(grad_rows, columns, weight)
        grad_input = None if grad_rows is None else grad_rows.to(x.dtype).view_as(x)
        return None, None, None, None, *_of_factors(grad_input, x, factor), *grad_weights, *grad_biases


def plus_bias(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns x [..., O] + bias [O]."""
    if not torch.is_grad_enabled():
        return x + bias
    added: torch.Tensor = _PlusBias.apply(x, bias)
    return added


class _PlusBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return x + bias

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], _sum_of_rows(grads[0].flatten(0, -2)) if ctx.needs_input_grad[1] else None


def _sum_of_rows(rows: torch.Tensor) -> torch.Tensor:
    """Returns the sum [O] of rows [N, O] in at least float32, which torch's own gradient of a bias would round."""
    return rows.sum(0, dtype=accurate_dtype(rows.dtype))


def _times(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    return x if factor is None else x * factor


def _of_factors(
    grad: torch.Tensor | None, x: torch.Tensor, factor: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns the gradients of the loss with respect to `x` and `factor`, given that with respect to their product; None for
    `factor` if it is None, and for both if `grad` is None."""
    return (grad, None) if factor is None or grad is None else (grad * factor, grad * x)


def grouped_linears(
    x: torch.Tensor,
    counts: list[int],
    *weights: torch.Tensor,
    factor: torch.Tensor | None = None,
    products: Products = torch_products,
) -> tuple[torch.Tensor, ...]:
    """Multiplies rows x [N, I], of which consecutive counts[e] belong to expert e, by each weight [E, O, I]; returns an output [N,
    O] for each weight, in x's dtype. `factor` and `products` as in `linears`."""
    if not torch.is_grad_enabled():
        return _grouped_outputs(products, x, factor, counts, weights)[0]
    outputs: tuple[torch.Tensor, ...] = _GroupedLinears.apply(products, x, factor, counts, *weights)
    return outputs


def _grouped_outputs(
    products: Products, x: torch.Tensor, factor: torch.Tensor | None, counts: list[int], weights: Sequence[torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Returns the result of `grouped_linears`, and the number of the row after those of each expert [E], if one kernel multiplies
    all."""
    if _in_one_kernel(products, x, *weights):
        rows = _times(x, factor)
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=x.device)
        return tuple(F.grouped_mm(rows, weight.mT, offs=ends) for weight in weights), ends
    rows = products.operand(_times(x, factor), multiply_dtype(x))
    parts = [products.operand(part, rows.dtype) for part in rows.split(counts)]
    outputs = [rows.new_empty(x.shape[0], weight.shape[1]) for weight in weights]
    for output, weight in zip(outputs, weights, strict=True):
        for part, out, expert in zip(parts, output.split(counts), weight, strict=True):
            products.outputs(part, expert, into=out)
    return tuple(output.to(x.dtype) for output in outputs), None


class _GroupedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, products: Products, x: torch.Tensor, factor: torch.Tensor | None, counts: list[int], *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, factor, *weights)
        ctx.products, ctx.counts, ctx.sinks = products, counts, [gradient_sink(weight) for weight in weights]
        outputs, ctx.ends = _grouped_outputs(products, x, factor, counts, weights)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, factor, *weights = ctx.saved_tensors
        by_experts = _grouped_backward if ctx.ends is not None else _separate_backward
        return None, *by_experts(ctx, x, factor, weights, grads)


def _in_one_kernel(products: Products, x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether the device has a kernel for the products of all experts together that accepts these tensors."""
    whole = all(size % _GROUPED_MULTIPLE == 0 for weight in weights for size in weight.shape[1:])
    return products.in_groups and on_nvidia(x) and x.dtype == torch.bfloat16 and x.shape[0] > 0 and whole


def _separate_backward(
    ctx: Any, x: torch.Tensor, factor: torch.Tensor | None, weights: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]
) -> Any:
    operand = partial(ctx.products.operand, dtype=multiply_dtype(x))
    whole = operand(_times(x, factor))
    grad_input = torch.zeros_like(whole)
    rows, into = [operand(part) for part in whole.split(ctx.counts)], grad_input.split(ctx.counts)
    grad_weights = []
    for grad, weight, sink, trained in zip(grads, weights, ctx.sinks, ctx.needs_input_grad[4:], strict=True):
        columns = operand(grad).split(ctx.counts)
        for grad_rows, column, expert in zip(into, columns, weight, strict=True):
            ctx.products.plus_input_gradient(grad_rows, column, expert)
        grad_weights.append(_weight_gradient(ctx.products, sink, weight, columns, rows) if trained else None)
    return *_of_factors(grad_input.to(x.dtype), x, factor), None, *grad_weights


def _grouped_backward(
    ctx: Any, x: torch.Tensor, factor: torch.Tensor | None, weights: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]
) -> Any:
    rows, ends = _times(x, factor), ctx.ends
    grad_input: torch.Tensor | None = None
    grad_weights: list[torch.Tensor | None] = []
    for grad, weight, sink, trained in zip(grads, weights, ctx.sinks, ctx.needs_input_grad[4:], strict=True):
        columns = grad.contiguous()
        through = F.grouped_mm(columns, weight, offs=ends)
        grad_input = through if grad_input is None else grad_input.add_(through)
        compute = partial(_experts_gradient, columns, rows, ends)
        if sink is not None:
            sink.add_computed(compute)
        grad_weights.append(compute().to(accurate_dtype(weight.dtype)) if trained and sink is None else None)
    assert grad_input is not None
    return *_of_factors(grad_input, x, factor), None, *grad_weights


def _experts_gradient(columns: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Returns the gradients [E, O, I] of the weights of experts, given the gradients of their outputs [N, O] and their inputs [N,
    I], of which expert e has the rows up to ends[e]. It may run later than the rest of the backward pass."""
    return F.grouped_mm(columns.T, rows, offs=ends)


def _weight_gradient(
    products: Products,
    sink: GradientSink | None,
    weight: torch.Tensor,
    columns: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
) -> torch.Tensor | None:
    """Returns the gradient of the loss with respect to `weight`, of at least float32: columns.T @ rows, for a weight with several
    experts stacked over experts. With a `sink`, passes both to it and returns None."""
    if sink is not None:
        sink.add_products(products, columns, rows)
        return None
    total = weight.new_empty(weight.shape, dtype=accurate_dtype(weight.dtype))
    for part, of_outputs, of_inputs in zip(total.unsqueeze(0) if total.ndim == 2 else total, columns, rows, strict=True):
        products.add_weight_gradient(part, of_outputs, of_inputs, fresh=True)
    return total
