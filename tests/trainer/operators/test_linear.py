"""Gradients of every kernel against finite differences in float64; 16-bit forms against exact values within their rounding.

A 16-bit result is the exact one rounded once or twice, whatever width it was multiplied and summed in. What only holds where
16-bit operands are widened for the product is tested so on every chip; a chip that multiplies them itself is tested besides.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bagualu.parallel import precision, vocabulary
from bagualu.parallel.precision import accurate_dtype
from bagualu.parallel.vocabulary import IGNORED, linear_cross_entropy
from bagualu.trainer.operators import linear, rotary
from bagualu.trainer.operators.attention import attention_in_blocks, causal_attention
from bagualu.trainer.operators.linear import grouped_linears, linears, plus_bias
from bagualu.trainer.operators.norm import layer_norm, rms_norm
from bagualu.trainer.operators.rotary import rotate

HALVES = [torch.bfloat16, torch.float16]


NATIVE = [dtype for dtype in HALVES if precision.multiply_dtype(torch.empty(0, dtype=dtype)) == dtype]
"""What this chip multiplies as it is."""


@pytest.fixture
def _widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_CPU_MULTIPLIES", dict.fromkeys(HALVES, False))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def angles(length: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    turns = torch.arange(length * half, dtype=torch.float64).view(length, half)
    return torch.cat((turns.cos(), turns.cos()), -1), torch.cat((-turns.sin(), turns.sin()), -1)


COUNTS = [0, 3, 0, 2, 0]
COS, SIN = angles(3, 2)
SLOPES = torch.tensor([0.3, 0.07])

# name: function of tensors, their shapes
KERNELS: dict[str, tuple[Callable[..., object], list[tuple[int, ...]]]] = {
    "linears": (lambda x, a, b, c: linears(x, a, b, c), [(2, 3, 4), (5, 4), (1, 4), (3, 4)]),
    "linears_with_biases": (
        lambda x, a, b, c, d, e: linears(x, a, b, c, biases=[d, None, e]),
        [(2, 3, 4), (5, 4), (1, 4), (3, 4), (5,), (3,)],
    ),
    "plus_bias": (lambda x, b: plus_bias(x, b), [(2, 3, 4), (4,)]),
    "one_linear": (lambda x, a: linears(x, a)[0], [(3, 4), (5, 4)]),
    "grouped_linears": (lambda x, v, w: torch.cat(grouped_linears(x, COUNTS, v, w), 1), [(5, 4), (5, 3, 4), (5, 2, 4)]),
    "linears_of_a_product": (lambda x, y, a, b: linears(x, a, b, factor=y), [(2, 3, 4), (2, 3, 4), (5, 4), (1, 4)]),
    "grouped_linears_of_a_product": (lambda x, y, w: grouped_linears(x, COUNTS, w, factor=y)[0], [(5, 4), (5, 4), (5, 3, 4)]),
    "grouped_linears_no_rows": (lambda x, w: grouped_linears(x, [0, 0], w)[0], [(0, 4), (2, 3, 4)]),
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-2), [(2, 3, 4), (4,)]),
    "causal_attention_in_a_window": (lambda q, k, v: causal_attention(q, k, v, window=2), [(2, 2, 3, 4)] * 3),
    "layer_norm": (lambda x, w, b: layer_norm(x, w, b, 1e-2), [(2, 3, 4), (4,), (4,)]),
    "rotate": (lambda x: rotate(x, COS.to(x.device), SIN.to(x.device)), [(2, 3, 2, 4)]),
    "causal_attention": (causal_attention, [(2, 2, 3, 4)] * 3),
    "causal_attention_with_slopes": (lambda q, k, v: causal_attention(q, k, v, SLOPES.to(q.device)), [(2, 2, 3, 4)] * 3),
    "causal_attention_with_slopes_in_blocks": (lambda q, k, v: attention_in_blocks(q, k, v, SLOPES), [(2, 2, 3, 4)] * 3),
    "causal_attention_in_blocks": (attention_in_blocks, [(2, 2, 3, 4)] * 3),
    "causal_attention_shared_heads": (causal_attention, [(1, 4, 3, 2), (1, 2, 3, 2), (1, 2, 3, 2)]),
}


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    kernel, shapes = KERNELS[name]
    inputs = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(kernel, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", KERNELS)
def test_16_bit_values_and_gradients_are_the_exact_ones_rounded(name: str, dtype: torch.dtype) -> None:
    kernel, shapes = KERNELS[name]
    narrow = [draw(*shape, seed=i).detach().to(dtype).requires_grad_() for i, shape in enumerate(shapes)]
    exact = [x.detach().double().requires_grad_() for x in narrow]
    outputs, expected = _as_tuple(kernel(*narrow)), _as_tuple(kernel(*exact))
    for output, value in zip(outputs, expected, strict=True):
        assert output.dtype == dtype
        assert_rounded(output, value)
    seeds = [torch.randn(o.shape, generator=torch.Generator().manual_seed(9)).to(dtype) for o in outputs]
    torch.autograd.backward(outputs, seeds)
    torch.autograd.backward(expected, [seed.double() for seed in seeds])
    for x, reference in zip(narrow, exact, strict=True):
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert_rounded(x.grad, reference.grad, several=name.startswith("causal"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("direction", [1, -1])
def test_rotating_by_halves_gives_the_same_bits(direction: int, dtype: torch.dtype) -> None:
    wide = accurate_dtype(dtype)
    x, (cos, sin) = draw(2, 7, 3, 8).detach().to(dtype), (one.to(wide) for one in angles(7, 4))
    assert torch.equal(rotary._rotated_by_halves(x, cos, sin, direction), rotary._rotated(x, cos, sin, direction))


ON_GPU: dict[str, list[tuple[int, ...]]] = {
    "linears": [(2, 64, 128), (256, 128), (64, 128), (64, 128)],
    "grouped_linears": [(5, 128), (5, 256, 128), (5, 64, 128)],
    "linears_of_a_product": [(2, 64, 128), (2, 64, 128), (256, 128), (64, 128)],
    "grouped_linears_of_a_product": [(5, 128), (5, 128), (5, 256, 128)],
    "grouped_linears_no_rows": [(0, 64), (2, 128, 64)],
    "rms_norm": [(2, 64, 256), (256,)],
    "layer_norm": [(2, 64, 256), (256,), (256,)],
    "rotate": [(2, 3, 2, 4)],
    "causal_attention": [(2, 4, 128, 64)] * 3,
    "causal_attention_with_slopes": [(2, 2, 128, 64)] * 3,
    "causal_attention_shared_heads": [(2, 4, 128, 64), (2, 2, 128, 64), (2, 2, 128, 64)],
}
"""Shapes that the fused kernels of a GPU take."""


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("name", ON_GPU)
def test_values_and_gradients_on_a_gpu(name: str, dtype: torch.dtype, error: float) -> None:
    """Against the same kernel in float64 on the CPU; `error` is relative, in the Euclidean norm."""
    kernel = KERNELS[name][0]
    here = [draw(*shape, seed=i).detach().to(dtype) for i, shape in enumerate(ON_GPU[name])]
    there, exact = [x.cuda().requires_grad_() for x in here], [x.double().requires_grad_() for x in here]
    outputs, expected = _as_tuple(kernel(*there)), _as_tuple(kernel(*exact))
    seeds = [torch.randn(o.shape, generator=torch.Generator().manual_seed(9)).to(dtype) for o in outputs]
    torch.autograd.backward(outputs, [seed.cuda() for seed in seeds])
    torch.autograd.backward(expected, [seed.double() for seed in seeds])
    for found, value in zip((*outputs, *(x.grad for x in there)), (*expected, *(x.grad for x in exact)), strict=True):
        assert found is not None
        assert value is not None
        assert found.dtype == dtype
        assert (found.detach().cpu().double() - value).norm() <= error * value.norm()


@pytest.mark.usefixtures("_widened")
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_reach_weights_unrounded(dtype: torch.dtype) -> None:
    for name, error in _weight_gradient_errors(dtype).items():
        assert error < torch.finfo(dtype).eps / 1000, name


@pytest.mark.parametrize("dtype", NATIVE)
def test_gradients_reach_weights_rounded_once_where_the_chip_multiplies(dtype: torch.dtype) -> None:
    """The head's twice: its logits' gradient is multiplied in 16 bits too."""
    for name, error in _weight_gradient_errors(dtype).items():
        assert error < torch.finfo(dtype).eps / 2 * (2 if name == "head" else 1), name


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_of_biases_are_not_rounded(dtype: torch.dtype) -> None:
    """Gradient buckets ask for wide gradients by `grad_dtype`."""
    for kernel in (lambda x, b: linears(x, torch.eye(5, dtype=dtype), biases=[b], dtype=dtype)[0], plus_bias):
        bias = torch.zeros(5, dtype=dtype, requires_grad=True)
        bias.grad_dtype = torch.float32
        grad = draw(300, 5).detach().to(dtype)
        kernel(torch.zeros(300, 5, dtype=dtype), bias).backward(grad)
        assert bias.grad is not None
        torch.testing.assert_close(bias.grad.double(), grad.double().sum(0), rtol=1e-5, atol=1e-5)


def _weight_gradient_errors(dtype: torch.dtype) -> dict[str, float]:
    """Returns, for each kernel, the error of its weight gradient relative to the largest value. Gradient buckets ask for wide
    gradients by `grad_dtype`."""
    errors = {}
    labels = torch.arange(30) % 5
    linear: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "linears": lambda x, w: linears(x, w)[0],
        "wide": lambda x, w: linears(x, w, wide=True)[0],
        "grouped": lambda x, w: grouped_linears(x, [30], w)[0],
        "head": lambda x, w: linear_cross_entropy(x, w, labels, 5),
    }
    for name, kernel in linear.items():
        shape = (1, 5, 40) if name == "grouped" else (5, 40)
        x, weight = (draw(*shape, seed=4).detach().to(dtype).requires_grad_() for shape in ((30, 40), shape))
        exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        weight.grad_dtype = torch.float32
        kernel(x, weight).double().sum().backward()
        kernel(exact_x, exact_weight).sum().backward()
        assert weight.grad is not None
        assert exact_weight.grad is not None
        assert weight.grad.dtype == torch.float32
        errors[name] = ((weight.grad.double() - exact_weight.grad).abs().max() / exact_weight.grad.abs().max()).item()
    return errors


def assert_rounded(actual: torch.Tensor, exact: torch.Tensor | None, several: bool = False) -> None:
    """`several`: a sum of a few values that were rounded themselves (the gradient of a key that heads share)."""
    assert exact is not None
    unit = torch.finfo(actual.dtype).eps * (4 if several else 1)
    largest = exact.abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(actual.double(), exact, rtol=unit, atol=unit * largest / 2)


def _as_tuple(value: object) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)  # type: ignore[return-value]


TOKENS, REAL, PADDED, HIDDEN = 7, 5, 8, 3
LABELS = torch.tensor([0, IGNORED, 4, 2, IGNORED, 4, 1])


@pytest.fixture(params=[1, 2, 3, 100], ids=lambda rows: f"{rows}_rows_a_chunk")
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "HEAD_CHUNK_TOKENS", request.param)


@pytest.mark.usefixtures("_chunks")
def test_loss_of_a_projection() -> None:
    x, weight = draw(TOKENS, HIDDEN, seed=1), draw(PADDED, HIDDEN, seed=2)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, LABELS, REAL), [x, weight], atol=1e-7)
    loss = linear_cross_entropy(x, weight, LABELS, REAL)
    expected = F.cross_entropy(x @ weight[:REAL].T, LABELS, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    (2.5 * loss).backward()
    found = x.grad, weight.grad
    x.grad = weight.grad = None
    (2.5 * expected).backward()
    torch.testing.assert_close(found, (x.grad, weight.grad), rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("_widened")
@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_loss_is_summed_in_float32_and_its_gradient_rounded_once(dtype: torch.dtype) -> None:
    """Scaled by 1/3 as a mean over 3 tokens would be: the scale itself is not rounded to 16 bits."""
    x, weight = (draw(*shape, seed=4).detach().to(dtype).requires_grad_() for shape in ((30, 40), (50, 40)))
    labels = torch.randint(0, 50, (30,), generator=torch.Generator().manual_seed(1))
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = linear_cross_entropy(x, weight, labels, 50)
    expected = linear_cross_entropy(exact_x, exact_weight, labels, 50)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (loss / 3).backward()
    (expected / 3).backward()
    for found, reference in ((x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert found is not None
        assert reference is not None
        assert_rounded(found, reference)
        along = (found.double() * reference).sum() / (reference * reference).sum()
        assert abs(along.item() - 1) < torch.finfo(dtype).eps / 20, "all gradients are off by one factor"


@pytest.mark.parametrize("labels", [torch.full((4,), IGNORED), torch.tensor([], dtype=torch.int64)])
def test_nothing_to_predict_is_a_loss_of_zero(labels: torch.Tensor) -> None:
    x, weight = draw(len(labels), HIDDEN), draw(REAL, HIDDEN)
    loss = linear_cross_entropy(x, weight, labels, REAL)
    loss.backward()
    assert loss == 0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_large_logits_do_not_overflow() -> None:
    x, weight = torch.tensor([[1000.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.tensor([1]), 2)
    loss.backward()
    assert loss == 2000
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_gradients_of_a_frozen_input_are_not_computed() -> None:
    x, weight = draw(3, 4).detach(), draw(5, 4)
    linears(x, weight)[0].sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 4))


@pytest.mark.parametrize("grouped", [False, True])
def test_the_gradient_of_a_frozen_weight_is_not_computed(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Size] = []

    def watched(products: object, sink: object, weight: torch.Tensor, *_: object) -> torch.Tensor:
        asked.append(weight.shape)
        return torch.zeros_like(weight)

    monkeypatch.setattr(linear, "_weight_gradient", watched)
    x = torch.randn(6, 4, requires_grad=True)
    shapes = [(2, 3, 4), (2, 5, 4)] if grouped else [(3, 4), (5, 4)]
    frozen, trained = (torch.randn(shape, requires_grad=needed) for shape, needed in zip(shapes, (False, True), strict=True))
    outputs = grouped_linears(x, [2, 4], frozen, trained) if grouped else linears(x, frozen, trained)
    sum(output.sum() for output in outputs).backward()
    assert asked == [trained.shape]
    assert x.grad is not None
