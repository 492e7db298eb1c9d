"""Every registered variant of every operator, of this package or another, on the chips of this machine: its results, its gradients,
and whole steps of a model that computes with it. Variants that are wrong in one point are found out."""

import functools
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bagualu.parallel.products import Products
from bagualu.parallel.vocabulary import loss_and_gradient
from bagualu.trainer.operators.attention import attention_blocks, attention_kernel
from bagualu.trainer.operators.gate import silu_gate
from bagualu.trainer.operators.kernel import Kernel
from bagualu.trainer.operators.norm import normalise
from bagualu.trainer.operators.operator_set import is_usable, variant_of
from bagualu.trainer.operators.registry import DEFAULT_VARIANTS, GENERATED, is_float8, load_variant, variants
from bagualu.trainer.operators.rotary import rotate
from bagualu.trainer.operators.update import adamw
from tests.harness import run
from tests.parity import Curve, assert_same, small_recipe, train
from tests.trainer.operators.conformance import check

DEVICES = [torch.device("cpu"), *([torch.accelerator.current_accelerator()] if torch.accelerator.is_available() else [])]
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="generating kernels needs a C++ compiler (g++ on PATH)")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REGISTERED = [
    (operator, variant, device)
    for device in DEVICES
    for operator in DEFAULT_VARIANTS
    for variant in variants(operator, device.type)
]


def _case(operator: str, variant: str, device: torch.device, other: Any, quick: bool) -> Any:
    """A case of a test; kernels that are generated, which takes seconds for each dtype, are slow unless it is `quick`."""
    marks = [NEEDS_COMPILER, *([] if quick else [pytest.mark.slow])] if variant == GENERATED else []
    if not is_usable(operator, variant, device.type):
        marks.append(pytest.mark.skip(reason="the variant needs what this machine has not"))
    return pytest.param(operator, variant, device, other, id=f"{operator}.{variant}.{device.type}-{other}", marks=marks)


@pytest.mark.parametrize(
    ("operator", "variant", "device", "dtype"),
    [_case(*case, dtype, quick=dtype == torch.bfloat16) for case in REGISTERED for dtype in DTYPES],
)
def test_results_and_gradients_are_those_of_the_formula(
    operator: str, variant: str, device: torch.device, dtype: torch.dtype
) -> None:
    function = load_variant(operator, variant, device.type)
    assert not hasattr(function, "fails") or function.fails(device.type) is None, "the default would be checked in its place"
    check(operator, variant_of(operator, variant, device.type), dtype, device)
    if variant == GENERATED:
        module = import_module(f"bagualu.trainer.operators.generated.{operator}")
        kernels = [value for value in vars(module).values() if isinstance(value, Kernel)]
        others = operator == "update"  # of its kernels one is for working weights in another dtype, one for the same
        assert sum(one.is_generated for one in kernels) >= len(kernels) - others, "the plain function ran"


MOE: dict[str, Any] = {"model__moe__experts": 4, "model__moe__top_k": 2, "model__moe__ffn": 8, "model__moe__every": 2}
LLAMA: dict[str, Any] = {"model__kv_heads": 2, "model__qk_norm": True, "model__window": 3, "model__full_attention_every": 2}
GPT: dict[str, Any] = {"model__norm": "layer", "model__positions": "alibi", "model__bias": "all"}
DEFERRED: dict[str, Any] = {"parallel__pipeline": 2, "parallel__schedule": "zb_h1", "train__micro_batch": 2}
"""Gradients of weights are put off."""
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tensor": (2, LLAMA, {"parallel__tensor": 2, "parallel__sequence": True, "train__recompute": "attention"}),
    "norms over ranks": (2, {**LLAMA, "model__qk_norm_over": "all"}, {"parallel__tensor": 2, "train__recompute": "full"}),
    "weight gradients put off": (2, {**MOE, **LLAMA}, DEFERRED),
    "biases": (2, GPT, {**DEFERRED, "train__recompute": "attention"}),
    "experts": (2, MOE, {"parallel__data": 2, "parallel__expert": 2, "train__recompute": "experts"}),
}


UNFELT = "key.bias"
"""A bias of keys changes all scores of a query alike, and so nothing."""


@functools.cache
def expected(model: str) -> list[Curve]:
    return run("simulated", 1, train, small_recipe(**LAYOUTS[model][1]), 2)


def _layout_case(operator: str, variant: str, device: torch.device, layout: str) -> Any:
    """Models that compute with the default variant of one operator or of another are the same model. So these variants take turns,
    each layout with one of them, and the other layouts of each are slow."""
    case = _case(operator, variant, device, layout, quick=False)
    turn = list(DEFAULT_VARIANTS)[list(LAYOUTS).index(layout) % len(DEFAULT_VARIANTS)]
    if variant == DEFAULT_VARIANTS[operator] and operator != turn:
        return pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
    return case


@pytest.mark.parametrize(
    ("operator", "variant", "device", "layout"),
    [_layout_case(*case, layout) for case in REGISTERED for layout in LAYOUTS if not is_float8(case[1])],  # test_float8_runs.py
)
def test_a_model_that_computes_with_it_has_the_same_curve_on_any_layout(
    operator: str, variant: str, device: torch.device, layout: str
) -> None:
    if device.type not in ("cpu", "cuda"):
        pytest.skip("ranks that share a device are simulated on CPUs and NVIDIA GPUs")
    assert_layout(operator, variant, device.type, layout)


def assert_layout(operator: str, variant: str, chip: str, layout: str) -> None:
    ranks, model, changes = LAYOUTS[layout]
    backend = "gloo" if variant == GENERATED and chip == "cpu" else "simulated"  # threads cannot share the compiler
    chosen = {f"operators__{operator}": variant, "comm__backend": backend, "comm__device": chip}
    recipe = small_recipe(**model, **changes, **chosen)
    assert_same(run(backend if chip == "cpu" else "simulated-cuda", ranks, train, recipe, 2), expected(layout), unfelt=UNFELT)


class _Scaled(torch.autograd.Function):
    """The tensor itself, with a gradient that is a little wrong."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 1.03


def scaled(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _Scaled.apply(x)
    return result


calls = iter(range(1, 10**9))


def sees_itself_only_from_the_second_window_on(*given: Any, window: int | None = None, mask: Any = None) -> torch.Tensor:
    return attention_blocks(*given, window=None if window is None else window + 1) if mask is None else attention_kernel(
        *given, window=window, mask=mask)  # fmt: skip


def forgets_slopes(query: Any, key: Any, value: Any, slopes: Any = None, **named: Any) -> torch.Tensor:
    return attention_kernel(query, key, value, None, **named)


def forgets_documents(*given: Any, mask: Any = None, **named: Any) -> torch.Tensor:
    return attention_kernel(*given, **named)


def shares_heads_in_turns(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> torch.Tensor:
    times = query.shape[1] // key.shape[1]
    return attention_kernel(query, key.repeat(1, times, 1, 1), value.repeat(1, times, 1, 1), *others, **named)


def forgets_a_gradient(query: Any, key: Any, *others: Any, **named: Any) -> torch.Tensor:
    return attention_kernel(query, scaled(key), *others, **named)


def changes_an_input(query: Any, *others: Any, **named: Any) -> torch.Tensor:
    output = attention_kernel(query.clone(), *others, **named)
    with torch.no_grad():
        query.data[..., :1] += 1
    return output


def is_another_each_time(*given: Any, **named: Any) -> torch.Tensor:
    return attention_kernel(*given, **named) * (1 + 1e-12 * next(calls))


def is_wrong_without_gradients(*given: Any, **named: Any) -> torch.Tensor:
    return attention_kernel(*given, **named) * (1 if torch.is_grad_enabled() else 1.03)


def adds_up_in_16_bits(x: Any, weight: Any, epsilon: Any, bias: Any = None, group: Any = None) -> torch.Tensor:
    if bias is not None:
        return normalise(x, weight, epsilon, bias)
    total = sum(x.square().unbind(-1)).unsqueeze(-1)
    return x / (total / x.shape[-1] + epsilon).sqrt() * weight


def forgets_epsilon(x: Any, weight: Any, epsilon: Any, *others: Any, **named: Any) -> torch.Tensor:
    return normalise(x, weight, 0.0, *others, **named)


class _Rounds(torch.autograd.Function):
    """The weight itself; its gradient is rounded on the way."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0].bfloat16().to(grads[0].dtype)


def rounds_the_gradient_of_the_weight(x: Any, weight: Any, *others: Any, **named: Any) -> torch.Tensor:
    return normalise(x, _Rounds.apply(weight), *others, **named)


def rotates_back(x: Any, cos: Any, sin: Any) -> torch.Tensor:
    return rotate(x, cos, -sin)


def rotates_the_gradient_too(x: Any, cos: Any, sin: Any) -> torch.Tensor:
    return rotate(x.detach(), cos, sin) + x - x.detach()


def multiplies_twice(gate: Any, up: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return F.silu(gate) * up, up


def gates_by_gelu(gate: Any, up: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return F.gelu(gate), up


def rounds_the_gate(gate: Any, up: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return silu_gate(gate.bfloat16().to(gate.dtype), up)


def counts_all(logits: Any, target: Any, counts: Any, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return loss_and_gradient(logits, target, torch.ones_like(counts), group)


def overflows(logits: Any, target: Any, counts: Any, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    powers = logits.exp()
    loss, gradient = loss_and_gradient(logits, target, counts, group)
    return loss + 0 * powers.sum(), gradient


def returns_the_logits(logits: Any, target: Any, counts: Any, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return loss_and_gradient(logits.clone(), target, counts, group)[0], logits


class ForgetsTheBias(Products):
    def outputs(self, rows: Any, weight: Any, bias: Any = None, into: Any = None, dtype: Any = None) -> torch.Tensor:
        return super().outputs(rows, weight, None, into, dtype)


class RoundsWhatShallBeWide(Products):
    def outputs(self, rows: Any, weight: Any, bias: Any = None, into: Any = None, dtype: Any = None) -> torch.Tensor:
        return super().outputs(rows.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype), into)


class AddsToOldGradients(Products):
    def add_weight_gradient(self, total: Any, columns: Any, rows: Any, fresh: bool) -> None:
        super().add_weight_gradient(total, columns, rows, fresh=False)


class AddsIn16Bits(Products):
    def add_weight_gradient(self, total: Any, columns: Any, rows: Any, fresh: bool) -> None:
        total.copy_((columns.T @ rows if fresh else total + columns.T @ rows).bfloat16())


class OverwritesTheSum(Products):
    def plus_input_gradient(self, total: Any, columns: Any, weight: Any, into: Any = None) -> torch.Tensor:
        return super().plus_input_gradient(None, columns, weight, into)


def rounds_before_the_step(weight: Any, working: Any, *others: Any) -> None:
    working.copy_(weight)
    adamw(weight, weight, *others)


def forgets_working_weights(weight: Any, working: Any, *others: Any) -> None:
    adamw(weight, weight, *others)


def forgets_the_factor(*given: Any) -> None:
    adamw(*given[:6], 1.0, *given[7:])


def decays_the_gradient(weight: Any, working: Any, gradient: Any, *others: Any) -> None:
    *numbers, decay, betas, epsilon = others
    adamw(weight, working, gradient.add_(weight, alpha=decay), *numbers, 0.0, betas, epsilon)


def counts_from_zero(weight: Any, working: Any, gradient: Any, average: Any, square: Any, step: Any, *others: Any) -> None:
    adamw(weight, working, gradient, average, square, step + 1, *others)


def adds_epsilon_within_the_root(*given: Any) -> None:
    *others, epsilon = given
    adamw(*others, epsilon**0.5 * 2)


WRONG: list[tuple[str, Any, torch.dtype, str]] = [
    ("attention", sees_itself_only_from_the_second_window_on, torch.float32, "with one key: result is wrong"),
    ("attention", forgets_slopes, torch.bfloat16, "with slopes: result is wrong"),
    ("attention", forgets_documents, torch.float32, "of documents: result is wrong"),
    ("attention", shares_heads_in_turns, torch.float32, "of one token: result is wrong"),
    ("attention", forgets_a_gradient, torch.bfloat16, "plain: gradient 1 is wrong by"),
    ("attention", changes_an_input, torch.float64, "an input was changed"),
    ("attention", is_another_each_time, torch.float64, "another result when it is repeated"),
    ("attention", is_wrong_without_gradients, torch.bfloat16, "result without gradients is wrong"),
    ("norm", adds_up_in_16_bits, torch.bfloat16, "is wrong by"),
    ("norm", forgets_epsilon, torch.float32, "is wrong by"),
    ("norm", rounds_the_gradient_of_the_weight, torch.float32, "gradient 1 is wrong by"),
    ("rotary", rotates_back, torch.bfloat16, "result is wrong"),
    ("rotary", rotates_the_gradient_too, torch.float32, "gradient 0 is wrong"),
    ("gate", multiplies_twice, torch.bfloat16, "result is wrong"),
    ("gate", gates_by_gelu, torch.bfloat16, "result is wrong"),
    ("gate", rounds_the_gate, torch.float32, "is wrong by"),
    ("loss", counts_all, torch.float32, "loss is wrong"),
    ("loss", overflows, torch.float32, "overflow"),
    ("loss", returns_the_logits, torch.float32, "gradient is wrong"),
    ("linear", ForgetsTheBias(), torch.bfloat16, "output with a bias is wrong"),
    ("linear", RoundsWhatShallBeWide(), torch.bfloat16, "output in another dtype than asked for"),
    ("linear", AddsToOldGradients(), torch.bfloat16, "gradient of a weight, fresh: True is wrong"),
    ("linear", AddsIn16Bits(), torch.float32, "gradient of a weight, fresh: False is wrong"),
    ("update", rounds_before_the_step, torch.bfloat16, "working weights are not the rounded weights"),
    ("update", forgets_working_weights, torch.float16, "working weights are not the rounded weights"),
    ("update", forgets_the_factor, torch.float32, "after 1 updates is wrong"),
    ("update", decays_the_gradient, torch.float32, "weight after 1 updates is wrong"),
    ("update", counts_from_zero, torch.float64, "weight after 1 updates is wrong"),
    ("update", adds_epsilon_within_the_root, torch.float32, "weight after 1 updates is wrong"),
    ("linear", OverwritesTheSum(), torch.bfloat16, "sum of gradients is wrong"),
]


def _name(wrong: Any) -> str:
    return str(getattr(wrong, "__name__", type(wrong).__name__))


@pytest.mark.parametrize(("operator", "wrong", "dtype", "said"), WRONG, ids=[_name(wrong) for _, wrong, *_ in WRONG])
def test_a_wrong_variant_is_found_out(operator: str, wrong: Any, dtype: torch.dtype, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check(operator, wrong, dtype, torch.device("cpu"))


MODULE = """
from bagualu.parallel.products import Products
from bagualu.parallel.vocabulary import loss_and_gradient
from bagualu.trainer.operators.norm import normalise

def alone(logits, target, counts, group):
    return loss_and_gradient(logits, target, counts, None)

def whole(x, weight, epsilon, bias=None, group=None):
    return normalise(x, weight, epsilon, bias)
"""


@pytest.mark.parametrize(("operator", "variant", "layout"), [("loss", "alone", "tensor"), ("norm", "whole", "norms over ranks")])
def test_so_is_one_that_forgets_the_other_ranks(
    operator: str, variant: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "quasar-1.0.dist-info"
    about.mkdir()
    (tmp_path / "quasar.py").write_text(MODULE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: quasar\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[bagualu.operators]\nloss.alone = quasar:alone\nnorm.whole = quasar:whole\n")
    monkeypatch.syspath_prepend(tmp_path)
    check(operator, variant_of(operator, variant, "cpu"), torch.float64, torch.device("cpu"))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_layout(operator, variant, "cpu", layout)
