"""The calls of operators in a step of a run, to be measured by the variants of each.

Shapes: B micro-batch, S sequence, H hidden, A query heads, G key heads, D head width, F feed-forward width, V vocabulary, all of a
rank; N rows, I input width, O output width of a linear layer.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch

from bagualu.parallel.config import EXPERT_ROWS_MULTIPLE, HEAD_CHUNK_TOKENS
from bagualu.parallel.precision import accurate_dtype, multiply_dtype
from bagualu.parallel.products import Products
from bagualu.trainer.costs.work import ModelWork
from bagualu.trainer.models.decoder.flops import attention_flops
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.operators.update import PIECE

_FLOPS_PER_SECOND = 6e10
_BYTES_PER_SECOND = 1e10
"""Estimates for a core or two, by which small work is recognised. What is larger is measured, on any chip."""
_MOST_ELEMENTS = 2**24
"""The most elements of an update that is measured on an accelerator, which updates whole shards at a time."""


@dataclass(frozen=True)
class PreparedCall:
    """A call with random values. `run` calls a variant and returns the tensor where the backward pass begins; `inputs` are those
    whose gradients it computes, none if there is no backward pass."""

    run: Callable[[Any], torch.Tensor]
    inputs: list[torch.Tensor]
    measures: Callable[[Any], bool] = lambda variant: True
    """Returns whether a variant is worth measuring: it has something of its own for this call."""


@dataclass(frozen=True)
class AttentionShape:
    """A call of attention, or of rotary positions for the queries. Query [B, A, S, D], key and value [B, G, S, D]."""

    batch: int
    heads: int
    key_heads: int
    length: int
    width: int
    window: int | None
    slopes: bool


@dataclass(frozen=True)
class RowsShape:
    """A call of an operator on rows [N, W]."""

    rows: int
    width: int
    kind: str = ""
    """Which of the operator's functions is called, where it has several."""


@dataclass(frozen=True)
class FlatShape:
    """An update of a flat buffer [n] of master weights, with working weights of a dtype."""

    elements: int
    working: str


@dataclass(frozen=True)
class LinearShape:
    """A linear layer [O, I] of rows [N, I]."""

    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        """Returns the operations of its forward and backward pass."""
        return 6 * self.rows * self.inputs * self.outputs


@dataclass(frozen=True)
class OperatorCalls:
    """Calls of `operator` that are alike, in a step."""

    operator: str
    shape: AttentionShape | RowsShape | LinearShape | FlatShape
    dtype: str
    calls: int
    """How many there are for each micro-batch, in all layers."""
    call_seconds: float
    """An estimate of the time of a call, with its backward pass."""
    each_step: bool = False
    """Whether there are so many calls in a step, rather than for each micro-batch."""

    def describe(self) -> dict[str, Any]:
        """Returns what the times of a call depend on besides the device."""
        return {"operator": self.operator, **asdict(self.shape), "dtype": self.dtype}

    def prepare(self, device: torch.device) -> PreparedCall:
        """Returns such a call, on `device`."""
        draw = torch.Generator(device).manual_seed(0)  # the run's random state stays as it is
        return _PREPARE[self.operator](self.shape, getattr(torch, self.dtype), device, draw)


def cases_of(work: ModelWork) -> Iterator[OperatorCalls]:
    """Yields the calls of all operators in the layers and the head of a run, and in its updates. Calls of other operators outside
    of layers, of which there are few, are left out."""
    model, tensor, tokens = work.model, work.layout.tensor, work.tokens
    heads, key_heads = model.heads // tensor, max(1, model.key_value_heads // tensor)
    multiplied = "float32" if work.widens else work.dtype  # the dtype in which queries and keys are projected
    windows = [model.window_of(layer) for layer in range(model.layers)]
    for window in dict.fromkeys(windows) if not work.documents else ():  # between documents there is one variant
        layer = windows.index(window)
        within = None if window is None or window >= work.sequence_length else window
        shape = AttentionShape(
            work.micro_batch, heads, key_heads, work.sequence_length, model.head_width, within, model.positions == "alibi"
        )
        flops = 3 * attention_flops(model, layer, work.sequence_length).attention * tokens / tensor
        yield OperatorCalls("attention", shape, multiplied, windows.count(window), flops / _FLOPS_PER_SECOND)

    def rows(operator: str, count: int, width: int, calls: int, kind: str = "") -> OperatorCalls:
        moved = 8 * count * width * work.accurate_bytes
        return OperatorCalls(operator, RowsShape(count, width, kind), work.dtype, calls, moved / _BYTES_PER_SECOND)

    yield rows("norm", work.tokens_between, model.hidden, 2 * model.layers, model.norm)
    if model.positions == "rotary":
        shape = AttentionShape(work.micro_batch, heads, key_heads, work.sequence_length, model.head_width, None, False)
        moved = 8 * tokens * heads * model.head_width * work.accurate_bytes
        yield OperatorCalls("rotary", shape, multiplied, 2 * model.layers, moved / _BYTES_PER_SECOND)
    mixtures = sum(model.is_moe_layer(layer) for layer in range(model.layers))
    if model.gated and mixtures < model.layers:
        yield rows("gate", tokens, model.ffn // tensor, model.layers - mixtures)
    if model.gated and mixtures:
        yield rows("gate", tokens * model.moe.top_k, model.moe.ffn // tensor, mixtures)
    chunk = min(tokens, HEAD_CHUNK_TOKENS)
    yield replace(rows("loss", chunk, model.padded_vocab // tensor, -(-tokens // chunk)), dtype=multiplied)
    for linear, calls in _linear_shapes(work).items():
        yield OperatorCalls("linear", linear, work.dtype, calls, linear.flops / _FLOPS_PER_SECOND)
    if elements := _updated_elements(work):
        piece = min(elements, PIECE if work.on_cpu else _MOST_ELEMENTS)
        moved = piece * (7 * work.accurate_bytes + work.item_bytes)
        wide = work.dtype if work.dtype == "float64" else "float32"
        seconds = moved / _BYTES_PER_SECOND
        yield OperatorCalls("update", FlatShape(piece, work.dtype), wide, -(-elements // piece), seconds, each_step=True)


def _updated_elements(work: ModelWork) -> int:
    """Returns about how many elements AdamW, which alone keeps two moments, updates on the ranks of all stages together."""
    shapes = parameter_shapes(work.model).items()
    elements = sum(prod(shape) for name, shape in shapes if name not in work.frozen and work.moments.get(name, 2) == 2)
    return elements // (work.layout.tensor * (work.layout.data if work.zero else 1))


def _linear_shapes(work: ModelWork) -> Counter[LinearShape]:
    """Returns how many linear layers of each shape a micro-batch passes. Experts get rows under an even load."""
    model, tensor, tokens = work.model, work.layout.tensor, work.tokens
    hidden, chunk = model.hidden, min(tokens, HEAD_CHUNK_TOKENS)
    wide, narrow = (width * model.head_width // tensor for width in (model.heads, model.key_value_heads))
    matrices = 1 + model.gated  # of a feed-forward, with its input; another has its output
    shapes = Counter({LinearShape(chunk, hidden, model.padded_vocab // tensor): -(-tokens // chunk)})
    for layer in range(model.layers):
        attention = {(hidden, wide): 1, (hidden, narrow): 2, (wide, hidden): 1}
        for (inputs, outputs), calls in attention.items():
            shapes[LinearShape(tokens, inputs, outputs)] += calls
        if model.is_moe_layer(layer):
            moe = model.moe
            rows, ffn, calls = -(-tokens * moe.top_k // moe.experts), moe.ffn // tensor, moe.experts
            rows = -(-rows // EXPERT_ROWS_MULTIPLE) * EXPERT_ROWS_MULTIPLE
        else:
            rows, ffn, calls = tokens, model.ffn // tensor, 1
        shapes[LinearShape(rows, hidden, ffn)] += matrices * calls
        shapes[LinearShape(rows, ffn, hidden)] += calls
    return shapes


def _attention(shape: AttentionShape, dtype: torch.dtype, device: torch.device, draw: torch.Generator) -> PreparedCall:
    def heads(count: int) -> torch.Tensor:  # as a layer hands them over: those of a projection
        drawn = torch.randn(shape.batch, shape.length, count, shape.width, dtype=dtype, device=device, generator=draw)
        return drawn.transpose(1, 2).requires_grad_()

    tensors = [heads(count) for count in (shape.heads, shape.key_heads, shape.key_heads)]
    if shape.slopes:
        tensors.append(torch.rand(shape.heads, dtype=accurate_dtype(dtype), device=device, generator=draw))
    named = {} if shape.window is None else {"window": shape.window}
    return PreparedCall(lambda variant: variant(*tensors, **named), tensors[:3])


def _rows(shape: RowsShape, dtype: torch.dtype, device: torch.device, draw: torch.Generator) -> torch.Tensor:
    return torch.randn(1, shape.rows, shape.width, dtype=dtype, device=device, generator=draw).requires_grad_()


def _norm(shape: RowsShape, dtype: torch.dtype, device: torch.device, draw: torch.Generator) -> PreparedCall:
    x = _rows(shape, dtype, device, draw)
    weight, bias = (torch.ones(shape.width, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    given = (x, weight, 1e-5, bias) if shape.kind == "layer" else (x, weight, 1e-5)
    return PreparedCall(lambda variant: variant(*given), [x, weight, bias][: len(given) - 1])


def _rotary(shape: AttentionShape, dtype: torch.dtype, device: torch.device, draw: torch.Generator) -> PreparedCall:
    x = torch.randn(
        shape.batch, shape.length, shape.heads, shape.width, dtype=dtype, device=device, generator=draw
    ).requires_grad_()
    cos, sin = torch.rand(2, shape.length, shape.width, dtype=accurate_dtype(dtype), device=device, generator=draw)
    return PreparedCall(lambda variant: variant(x, cos, sin), [x])


def _gate(shape: RowsShape, dtype: torch.dtype, device: torch.device, draw: torch.Generator) -> PreparedCall:
    gate, up = _rows(shape, dtype, device, draw), _rows(shape, dtype, device, draw)

    def run(variant: Callable[..., Any]) -> torch.Tensor:
        x, factor = variant(gate, up)
        product: torch.Tensor = x if factor is None else x * factor
        return product

    return PreparedCall(run, [gate, up])


def _loss(shape: RowsShape, dtype: torch.dtype, device: torch.device, draw: torch.Generator) -> PreparedCall:
    logits = torch.randn(shape.rows, shape.width, dtype=dtype, device=device, generator=draw)
    target = torch.randint(shape.width, (shape.rows,), device=device, generator=draw)
    counts = torch.ones(shape.rows, dtype=torch.bool, device=device)
    return PreparedCall(lambda variant: variant(logits, target, counts, None)[0], [])


def _linear(shape: LinearShape, dtype: torch.dtype, device: torch.device, draw: torch.Generator) -> PreparedCall:
    rows = torch.randn(shape.rows, shape.inputs, dtype=dtype, device=device, generator=draw)
    weight = torch.randn(shape.outputs, shape.inputs, dtype=dtype, device=device, generator=draw)
    gradient = torch.zeros(weight.shape, dtype=accurate_dtype(dtype), device=device)

    multiplied = multiply_dtype(rows)

    def run(products: Products) -> torch.Tensor:
        given = products.operand(rows, multiplied)
        output = products.outputs(given, weight, dtype=dtype)
        columns = products.operand(output, multiplied)
        products.plus_input_gradient(None, columns, weight).to(dtype)
        products.add_weight_gradient(gradient, columns, given, fresh=False)
        return output

    return PreparedCall(run, [], lambda products: products.computes(dtype, shape.rows, shape.inputs, shape.outputs))


def _update(shape: FlatShape, dtype: torch.dtype, device: torch.device, draw: torch.Generator) -> PreparedCall:
    weight, gradient = torch.randn(2, shape.elements, dtype=dtype, device=device, generator=draw)
    working: torch.Tensor = weight.to(getattr(torch, shape.working))  # the same memory if the dtype is the same
    moments, step = torch.zeros(2, shape.elements, dtype=dtype, device=device), torch.ones((), device=device)

    def run(variant: Callable[..., None]) -> torch.Tensor:
        variant(weight, working, gradient, *moments, step, 0.999, 1e-4, 0.1, (0.9, 0.95), 1e-8)
        return working

    return PreparedCall(run, [])


_PREPARE: dict[str, Callable[..., PreparedCall]] = {
    "attention": _attention,
    "norm": _norm,
    "rotary": _rotary,
    "gate": _gate,
    "loss": _loss,
    "linear": _linear,
    "update": _update,
}
