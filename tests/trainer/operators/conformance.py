"""What every variant of an operator must do, against plain formulas in float64.

Shapes: B micro-batch, S sequence, A query heads, G key heads, D head width, N rows, H width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bagualu.parallel.precision import accurate_dtype, multiply_dtype
from bagualu.parallel.products import Products
from bagualu.parallel.vocabulary import IGNORED
from bagualu.trainer.models.activations import run
from bagualu.trainer.operators.documents import document_mask

Variant = Callable[..., Any]
MANTISSA_BITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}
ERRORS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
"""By dtype, the largest error of a result or a gradient relative to it, in the Euclidean norm: of 16 bits, a few roundings."""


@dataclass(frozen=True)
class Trial:
    """A call of an operator. `call` gives a variant inputs like `inputs`, in any dtype; `reference` computes the same in
    float64."""

    name: str
    inputs: Sequence[torch.Tensor]
    call: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]
    weights: int = 0
    """How many of the last inputs are weights, whose gradients are summed in at least float32."""
    errors: int = 1
    """How many times as large as `ERRORS` errors may be, where sums of rounded numbers are rounded again."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heads(batch: int, length: int, count: int, width: int, seed: int) -> torch.Tensor:
    """[B, A, S, D] as a layer hands it over: heads of a projection."""
    return draw(batch, length, count, width, seed=seed).transpose(1, 2)


def attention_trials() -> Iterator[Trial]:
    slopes = torch.tensor([0.7, 0.2, 0.03, 0.004], dtype=torch.float64)
    documents = torch.tensor([[0] * 30 + [30] * 47, [0] * 76 + [76]])
    for name, length, groups, options in (
        ("plain", 64, 4, {}),
        ("of an odd length", 77, 4, {}),
        ("of one token", 1, 2, {}),
        ("with grouped heads", 130, 2, {}),
        ("with one key", 77, 1, {"window": 1}),
        ("in a window", 150, 2, {"window": 70}),
        ("in a window as long as the sequence", 77, 4, {"window": 77}),
        ("with slopes", 77, 4, {"slopes": slopes}),
        ("with slopes in a window", 150, 1, {"slopes": slopes, "window": 9}),
        ("of documents", 77, 2, {"documents": documents}),
        ("of documents in a window", 77, 4, {"documents": documents, "window": 20}),
    ):
        inputs = [heads(2, length, count, 16, seed) for seed, count in enumerate((4, groups, groups))]
        yield Trial(f"attention {name}", inputs, _attention_call(**options), _attention_reference(**options), errors=4)


def _attention_call(
    slopes: torch.Tensor | None = None, window: int | None = None, documents: torch.Tensor | None = None
) -> Callable[..., torch.Tensor]:
    def call(variant: Variant, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        given = () if slopes is None else (slopes.to(query.device, accurate_dtype(query.dtype)),)
        named: dict[str, Any] = {} if window is None else {"window": window}
        if documents is not None:
            named["mask"] = document_mask(documents.to(query.device), multiply_dtype(query))
        output: torch.Tensor = variant(query, key, value, *given, **named)
        return output

    return call


def _attention_reference(
    slopes: torch.Tensor | None = None, window: int | None = None, documents: torch.Tensor | None = None
) -> Callable[..., torch.Tensor]:
    def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        length, shared = query.shape[2], query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        positions = torch.arange(length)
        distances = positions - positions.unsqueeze(1)
        seen = (distances <= 0) & (distances > -(window or length))
        if documents is not None:
            seen = seen & (positions >= documents.unsqueeze(-1)).unsqueeze(1)
        scores = query @ keys.mT / math.sqrt(query.shape[-1])
        if slopes is not None:
            scores = scores + slopes.view(-1, 1, 1) * distances
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values

    return reference


def norm_trials() -> Iterator[Trial]:
    for rows, width in ((7, 48), (33, 130)):
        x, weight, bias = draw(2, rows, width) * 3 + 1, draw(width, seed=1), draw(width, seed=2)
        yield Trial(
            f"RMS norm of {rows} x {width}",
            [x, weight],
            lambda variant, x, weight: variant(x, weight, 1e-3),
            lambda x, weight: x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight,
            weights=1,
        )
        yield Trial(
            f"layer norm of {rows} x {width}",
            [x, weight, bias],
            lambda variant, x, weight, bias: variant(x, weight, 1e-3, bias),
            lambda x, weight, bias: (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + 1e-3).sqrt() * weight + bias,
            weights=2,
        )
    head = heads(2, 9, 3, 16, 0).transpose(1, 2)  # those of heads, whose rows lie apart
    yield Trial(
        "RMS norm of heads",
        [head, draw(16, seed=1)],
        lambda variant, x, weight: variant(x, weight, 1e-6),
        lambda x, weight: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight,
        weights=1,
    )


def rotary_trials() -> Iterator[Trial]:
    for name, length, count, own in (("", 9, 3, False), (" of one token", 1, 4, False), (" of documents", 77, 2, True)):
        angles = draw(2, length, 8, seed=5) if own else draw(length, 8, seed=5)
        cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)

        def call(variant: Variant, x: torch.Tensor, cos: torch.Tensor = cos, sin: torch.Tensor = sin) -> torch.Tensor:
            rotated: torch.Tensor = variant(x, *(one.to(x.device, accurate_dtype(x.dtype)) for one in (cos, sin)))
            return rotated

        def reference(x: torch.Tensor, angles: torch.Tensor = angles) -> torch.Tensor:
            pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
            return torch.cat((pairs.real, pairs.imag), -1)

        yield Trial(f"rotation{name}", [draw(2, length, count, 16)], call, reference)


def gate_trials() -> Iterator[Trial]:
    def call(variant: Variant, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        x, factor = variant(gate, up)
        product: torch.Tensor = x if factor is None else x * factor
        return product

    for shape in ((2, 9, 24), (5, 130), (0, 24)):
        gate, up = draw(*shape) * 4, draw(*shape, seed=1)
        yield Trial(f"gate of {shape}", [gate, up], call, lambda gate, up: gate * torch.sigmoid(gate) * up, errors=2)


def check_differentiable(trial: Trial, variant: Variant, dtype: torch.dtype, device: torch.device) -> None:
    """The result and all gradients, with and without a record for the backward pass, and computed again in it."""
    bound = ERRORS[dtype] * trial.errors
    narrow = [_like(x, dtype, device) for x in trial.inputs]
    before = [x.detach().clone() for x in narrow]
    exact = [x.detach().to("cpu", torch.float64, copy=True).requires_grad_() for x in narrow]
    output, expected = trial.call(variant, *narrow), trial.reference(*exact)
    seed = draw(*output.shape, seed=9).to(dtype)
    grads = torch.autograd.grad(output, narrow, seed.to(device))
    references = torch.autograd.grad(expected, exact, seed.double())
    assert output.dtype == dtype, "another dtype"
    _assert_close("result", output, expected, bound)
    for index, (grad, reference) in enumerate(zip(grads, references, strict=True)):
        _assert_close(f"gradient {index}", grad, reference, bound)
    assert all(torch.equal(x, was) for x, was in zip(narrow, before, strict=True)), "an input was changed"
    with torch.no_grad():
        _assert_close("result without gradients", trial.call(variant, *narrow), expected, bound)
    first, *others = narrow
    for again in (False, True):
        repeated = run(lambda x: trial.call(variant, x, *others), first, again=again)
        assert torch.equal(repeated, output), "another result when it is repeated"
        for grad, other in zip(grads, torch.autograd.grad(repeated, narrow, seed.to(device)), strict=True):
            assert torch.equal(grad, other), "another gradient when it is repeated"
    _check_weights(trial, variant, dtype, device, seed, references)


def _check_weights(
    trial: Trial, variant: Variant, dtype: torch.dtype, device: torch.device, seed: torch.Tensor, references: Sequence[torch.Tensor]
) -> None:
    """Gradients of weights reach buckets, which ask for them by `grad_dtype`, in at least float32, and a frozen weight has none."""
    bound = ERRORS[dtype] * trial.errors
    narrow = [_like(x, dtype, device) for x in trial.inputs]
    weights = narrow[len(narrow) - trial.weights :]
    for weight in weights:
        weight.grad_dtype = accurate_dtype(dtype)  # type: ignore[attr-defined]
    trial.call(variant, *narrow).backward(seed.to(device))
    for weight, reference in zip(weights, references[len(narrow) - trial.weights :], strict=True):
        assert weight.grad is not None
        assert weight.grad.dtype == accurate_dtype(dtype), "a rounded gradient of a weight"
        _assert_close("gradient of a weight", weight.grad, reference, bound)
    frozen = [_like(x, dtype, device).requires_grad_(index == 0) for index, x in enumerate(trial.inputs)]
    (grad,) = torch.autograd.grad(trial.call(variant, *frozen), frozen[:1], seed.to(device))
    _assert_close("gradient beside frozen inputs", grad, references[0], bound)


def _like(x: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A leaf with the values of `x`, and its strides."""
    return x.detach().to(device, dtype, copy=True, memory_format=torch.preserve_format).requires_grad_()


def check_loss(variant: Variant, dtype: torch.dtype, device: torch.device) -> None:
    """The loss of a chunk of tokens and its gradient."""
    for rows, vocabulary in ((7, 5), (130, 77), (1, 3), (0, 4)):
        logits = (draw(rows, vocabulary) * 6).to(device, dtype)
        counts = torch.arange(rows) % 3 != 1
        target = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(3)).where(counts, IGNORED)
        exact = logits.to("cpu", torch.float64, copy=True).requires_grad_()
        every = F.cross_entropy(exact, target, ignore_index=IGNORED, reduction="sum")
        (reference,) = torch.autograd.grad(every, exact)
        loss, gradient = variant(logits, target.to(device), counts.to(device), None)
        assert (loss.dtype, loss.shape, gradient.dtype) == (accurate_dtype(dtype), (), dtype), "another dtype or shape"
        _assert_close("loss", loss, every.detach(), ERRORS[loss.dtype])
        _assert_close("gradient", gradient, reference, ERRORS[dtype])
    large = torch.tensor([[1000.0, -1000.0]], dtype=dtype, device=device)
    loss, gradient = variant(large, torch.tensor([1], device=device), torch.tensor([True], device=device), None)
    assert loss == 2000, "an overflow"
    assert gradient.tolist() == [[1.0, -1.0]], "an overflow"


def _in_columns(x: torch.Tensor) -> torch.Tensor:
    """A copy of x [N, W] of which the elements of a column lie side by side."""
    return x.T.clone(memory_format=torch.contiguous_format).T


def float8_error(left: torch.dtype, right: torch.dtype) -> float:
    """The largest relative error, in the Euclidean norm, of a product of many numbers that were rounded to float8. Rounding one to
    m bits of mantissa is off by at most half of its last bit, 2^-(m+1) of the number, and by 2^-(m+1) / sqrt(3) in the root mean
    square if errors are spread evenly. Those of the two factors are independent."""
    squares = [2.0 ** (-2 * (MANTISSA_BITS[dtype] + 1)) / 3 for dtype in (left, right)]
    return math.sqrt(sum(squares))


def check_linear(products: Products, dtype: torch.dtype, device: torch.device) -> None:
    """The products of linear layers, alone and added to what is there, for many and few rows and for widths that tiles divide or do
    not; rows, weights and gradients may be parts of larger tensors."""
    for rows, inputs, outputs in (
        (1, 32, 64),
        (40, 24, 32),
        (77, 96, 32),
        (32, 64, 96),
        (130, 160, 288),
        (2100, 32, 64),
        (40, 32, 0),
        (320, 64, 2112),
        (9, 4200, 17),
        (0, 32, 32),
    ):
        x, weight, columns = draw(rows, inputs + 8), draw(outputs, inputs, seed=1), draw(rows, outputs + 8, seed=2)
        x, weight, columns = (one.to(device, dtype) for one in (x, weight, columns))
        x, columns = x[:, :inputs], columns[:, 8:]
        wide = accurate_dtype(dtype)
        of_outputs = of_gradients = ERRORS[dtype]
        if products.of_rows and products.of_gradients and products.computes(dtype, rows, inputs, outputs):
            of_outputs = float8_error(products.of_rows, products.of_rows)
            of_gradients = float8_error(products.of_gradients, products.of_rows)
        bias, before = draw(outputs, seed=3).to(device, dtype), draw(rows, inputs, seed=4).to(device, dtype)
        total = draw(outputs, inputs, seed=5).to(device, wide)
        exact_x, exact_weight, exact_columns, exact_before = (one.cpu().double() for one in (x, weight, columns, before))
        exact = exact_x @ exact_weight.T, exact_columns @ exact_weight, exact_columns.T @ exact_x
        for name, found, expected in (
            ("output", products.outputs(x, weight), exact[0]),
            ("output of several dimensions", products.outputs(x.unflatten(0, (1, rows)), weight)[0], exact[0]),
            ("output with a bias", products.outputs(x, weight, bias), exact[0] + bias.cpu().double()),
            ("output written elsewhere", products.outputs(x, weight, into=torch.empty_like(columns)), exact[0]),
            ("output written to columns", products.outputs(x, weight, into=_in_columns(columns)), exact[0]),
            ("output for a transposed weight", products.outputs(x, _in_columns(weight)), exact[0]),
            ("output for operands as it takes them", products.outputs(products.operand(x, wide), weight, dtype=dtype), exact[0]),
            ("gradient of the input", products.plus_input_gradient(None, columns, weight), exact[1]),
            ("sum of gradients", products.plus_input_gradient(before.clone(), columns, weight), exact_before + exact[1]),
            ("gradient written elsewhere", products.plus_input_gradient(None, columns, weight, into=x.clone()), exact[1]),
            ("gradient written to columns", products.plus_input_gradient(None, columns, weight, into=_in_columns(x)), exact[1]),
            ("sum in columns", products.plus_input_gradient(_in_columns(before), columns, weight), exact_before + exact[1]),
        ):
            assert found.dtype == dtype, f"{name} in another dtype"
            _assert_close(name, found, expected, of_outputs if name.startswith("output") else of_gradients)
        unrounded = products.outputs(products.operand(x, wide), weight, bias.to(wide), dtype=wide)
        assert unrounded.dtype == wide, "output in another dtype than asked for"
        _assert_close("output that is not rounded", unrounded, exact[0] + bias.cpu().double(), of_outputs)
        for fresh, expected in ((False, total.cpu().double() + exact[2]), (True, exact[2])):
            products.add_weight_gradient(total, columns, x, fresh)
            _assert_close(f"gradient of a weight, fresh: {fresh}", total, expected, of_gradients)


def check_update(variant: Variant, dtype: torch.dtype, device: torch.device) -> None:
    """Several updates of flat buffers, in place and nowhere else, with working weights in `dtype`, and what lies beside them."""
    wide = accurate_dtype(dtype)
    for number, (elements, factor, decay, epsilon) in enumerate(
        ((1000, 1.0, 0.1, 1e-8), (1029, 0.37, 0.0, 1e-2), (64, 2.0, 0.1, 1e-8), (3, 0.37, 0.1, 1e-8), (2**17 + 5, 0.5, 0.1, 1e-8))
    ):
        buffers = [draw(elements + 2, seed=7 * number).to(device, wide), *torch.zeros(2, elements + 2, dtype=wide, device=device)]
        buffers.append(buffers[0] if wide == dtype else buffers[0].to(dtype))
        around = [buffer[[0, -1]].clone() for buffer in buffers]
        weight, average, square, working = (buffer[1:-1] for buffer in buffers)
        exact, mean, spread = (
            weight.to("cpu", torch.float64, copy=True),
            torch.zeros(elements).double(),
            torch.zeros(elements).double(),
        )
        step, first, second = torch.zeros((), device=device), 0.9, 0.95
        for count in range(1, 5):
            lr = 0.02 * count
            gradient = draw(elements, seed=7 * number + count).to(device, wide)
            slope = gradient.to("cpu", torch.float64, copy=True) * factor
            step += 1
            variant(weight, working, gradient, average, square, step, factor, lr, decay, (first, second), epsilon)
            mean, spread = first * mean + (1 - first) * slope, second * spread + (1 - second) * slope**2
            root = (spread / (1 - second**count)).sqrt()
            exact = exact * (1 - lr * decay) - lr * mean / (1 - first**count) / (root + epsilon)
            for name, found, expected in (("weight", weight, exact), ("average", average, mean), ("square", square, spread)):
                _assert_close(f"{name} after {count} updates", found, expected, ERRORS[wide])
            assert torch.equal(working, weight.to(dtype)), "working weights are not the rounded weights"
            assert step == count, "the number of updates was changed"
        for buffer, before in zip(buffers, around, strict=True):
            assert torch.equal(buffer[[0, -1]], before), "an element beside the buffer was changed"


TRIALS: dict[str, Callable[[], Iterator[Trial]]] = {
    "attention": attention_trials,
    "norm": norm_trials,
    "rotary": rotary_trials,
    "gate": gate_trials,
}


def check(operator: str, variant: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Raises AssertionError unless the variant does what it must, in one dtype."""
    if operator == "loss":
        return check_loss(variant, dtype, device)
    if operator == "update":
        return check_update(variant, dtype, device)
    if operator == "linear":
        return check_linear(variant, dtype, device)
    for trial in TRIALS[operator]():
        try:
            check_differentiable(trial, variant, dtype, device)
        except AssertionError as error:
            raise AssertionError(f"{trial.name}: {error}") from error
    return None


def _assert_close(what: str, found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    assert found.shape == expected.shape, f"{what} of another shape"
    error = (found.detach().cpu().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=1)
    assert error <= bound, f"{what} is wrong by {error:.1e}"
