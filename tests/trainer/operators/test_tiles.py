"""Attention in tiles is causal attention, as exact as torch's kernel, for all shapes and wherever its inputs lie; a machine that
cannot compute it says why, or does without."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bagualu.comm.errors import RecipeError
from bagualu.trainer.costs import activations
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.operators import tiles
from bagualu.trainer.operators.attention import attention_kernel
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.cpp_kernels import AVX512_BF16
from bagualu.trainer.operators.operator_set import is_usable, operator_set, variant_of
from bagualu.trainer.operators.tiles import AttentionTiles, attention_tiles, workspace_bytes
from tests.harness import run
from tests.parity import small_recipe, train

CHOSEN = OperatorsConfig(attention="tiles")
can = pytest.mark.skipif(attention_tiles.lacks() is not None, reason=f"attention in tiles needs {attention_tiles.lacks()}")
SHAPES = [  # B, A, G, S, D
    (1, 1, 1, 1, 16), (2, 2, 2, 2, 64), (1, 2, 1, 31, 32), (2, 2, 2, 32, 48), (1, 3, 3, 33, 64), (1, 2, 2, 63, 16),
    (1, 4, 2, 64, 128), (1, 3, 3, 65, 96), (2, 4, 2, 77, 48), (2, 4, 4, 256, 64), (1, 8, 2, 513, 128), (1, 4, 1, 1100, 80),
]  # fmt: skip
Tensors = list[torch.Tensor]


def draw(shape: tuple[int, ...], exact: bool = False) -> Tensors:
    """Query, key, value and the gradient of the output, as they come from projections."""
    batch, heads, groups, length, width = shape
    random = torch.Generator().manual_seed(sum(shape))
    drawn = [torch.randn(batch, length, n, width, generator=random) * 1.5 for n in (heads, groups, groups, heads)]
    return [x.bfloat16().to(torch.float64 if exact else torch.bfloat16).transpose(1, 2).requires_grad_() for x in drawn]


def exactly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    shared = query.shape[1] // key.shape[1]
    every = (x.repeat_interleave(shared, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, *every, is_causal=True)


def results(attention: object, inputs: Tensors) -> Tensors:
    """The output, and the gradients of query, key and value."""
    output = attention(*inputs[:3])
    return [output.detach(), *torch.autograd.grad(output, inputs[:3], inputs[3].detach())]


def errors(found: Tensors, expected: Tensors) -> list[float]:
    return [((x.double() - y).norm() / y.norm().clamp(min=1e-3)).item() for x, y in zip(found, expected, strict=True)]


@can
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_exact_as_torchs_kernel(shape: tuple[int, ...]) -> None:
    assert attention_tiles.takes(*draw(shape)[:3])
    expected = results(exactly, draw(shape, exact=True))
    found = results(attention_tiles, draw(shape))
    assert [x.shape for x in found] == [x.shape for x in expected]
    for own, torchs in zip(errors(found, expected), errors(results(attention_kernel, draw(shape)), expected), strict=True):
        assert own <= 1.1 * torchs + 1e-4


@can
def test_inputs_are_read_where_they_lie() -> None:
    """In a projection of all three, head by head, with a stride in each head; and a gradient that repeats one row."""
    shape = (2, 4, 2, 70, 32)
    inputs = draw(shape)
    expected = results(attention_tiles, inputs)
    joined = torch.cat([x.detach().transpose(1, 2).flatten(2) for x in inputs[:3]], -1)
    split = [x.unflatten(-1, (-1, 32)).transpose(1, 2).requires_grad_() for x in joined.split((128, 64, 64), -1)]
    by_head = [x.detach().contiguous().requires_grad_() for x in inputs]
    strided = [torch.stack((x.detach(), -x.detach()), -1)[..., 0].requires_grad_() for x in inputs]
    assert strided[0].stride(-1) == 2
    for others in ([*split, inputs[3]], by_head, strided):
        assert all(torch.equal(x, y) for x, y in zip(results(attention_tiles, others), expected, strict=True))
    row = inputs[3][:1, :1, :1]
    once = results(attention_tiles, [*inputs[:3], row.expand_as(inputs[3])])
    again = results(attention_tiles, [*inputs[:3], row.expand_as(inputs[3]).contiguous()])
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


@can
def test_what_a_layer_does_next_needs_no_copy() -> None:
    output, *grads = results(attention_tiles, draw((2, 4, 2, 70, 32)))
    assert all(x.transpose(1, 2).is_contiguous() for x in (output, *grads))


@can
@pytest.mark.parametrize("length", [70, 600])
def test_no_token_sees_a_later_one(length: int) -> None:
    query, key, value, _ = draw((1, 2, 2, length, 32))
    whole = attention_tiles(query, key, value)
    part = attention_tiles(*(x[:, :, : length - 9] for x in (query, key, value)))
    torch.testing.assert_close(whole[:, :, : length - 9], part, rtol=0.01, atol=0.01)
    grads = torch.autograd.grad(whole[:, :, :20].sum(), (query, key, value))
    for grad in grads:
        assert not grad[:, :, 20:].any()
        assert grad[:, :, :20].any()


@can
@pytest.mark.parametrize("large", [30.0, 3e4])
def test_large_scores_do_not_overflow(large: float) -> None:
    inputs = draw((1, 2, 2, 600, 32))
    inputs[0] = (inputs[0].detach() * large).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for own, torchs in zip(errors(results(attention_tiles, inputs), results(exactly, exact)),
                           errors(results(attention_kernel, inputs), results(exactly, exact)), strict=True):  # fmt: skip
        assert own <= 1.2 * torchs + 1e-4


@can
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_number_is_not_hidden(which: int, value: float) -> None:
    inputs = draw((1, 1, 1, 40, 32))
    with torch.no_grad():
        inputs[which][0, 0, 3, 5] = value
    output, *grads = results(attention_tiles, inputs)
    assert not output[0, 0, 3:].isfinite().all()
    assert not all(grad.isfinite().all() for grad in grads)


LARGE_IN_NEW_MEMORY = {"MALLOC_PERTURB_": "128"}
"""glibc fills memory that it hands out with 0x7f, which as float32 is 3.4e38."""


@can
def test_it_reads_no_memory_that_it_has_not_written() -> None:
    program = """
import torch
from tests.trainer.operators.test_tiles import SHAPES, attention_tiles, draw, results
for shape in SHAPES:
    assert all(x.isfinite().all() for x in results(attention_tiles, draw(shape))), shape
"""
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **LARGE_IN_NEW_MEMORY}, cwd=root, check=True)


@can
def test_results_are_the_same_each_time_and_for_any_number_of_threads() -> None:
    inputs, before = draw((3, 4, 2, 200, 48)), torch.get_num_threads()
    first = results(attention_tiles, inputs)
    try:
        for threads in (1, 2, 3, before):
            torch.set_num_threads(threads)
            assert all(torch.equal(x, y) for x, y in zip(results(attention_tiles, inputs), first, strict=True))
    finally:
        torch.set_num_threads(before)


@can
def test_what_it_does_not_compute_is_the_kernels() -> None:
    query, key, value, _ = draw((1, 4, 2, 40, 32))
    slopes = torch.rand(4)
    mask = torch.zeros(1, 1, 40, 40)
    assert attention_tiles.takes(query, key, value, None, 40)
    assert not attention_tiles.takes(query, key, value, slopes)
    assert not attention_tiles.takes(query, key, value, None, 39)
    assert not attention_tiles.takes(query, key, value, mask=mask)
    assert not attention_tiles.takes(*(x.float() for x in (query, key, value)))
    assert not attention_tiles.takes(*(x[..., :24] for x in (query, key, value)))
    assert not attention_tiles.takes(query, key, value[..., :16])
    assert not attention_tiles.takes(*(x.to("meta") for x in (query, key, value)))
    chosen = operator_set(CHOSEN, "cpu").attention
    assert torch.equal(chosen(query, key, value, slopes, 7), attention_kernel(query, key, value, slopes, 7))
    assert torch.equal(chosen(query, key, value), attention_tiles(query, key, value))
    assert not attention_tiles.takes(query, key[:, :, :-1], value[:, :, :-1])
    assert not attention_tiles.takes(query.expand(2, -1, -1, -1), key, value)


def no_compiler(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("CXX", "no-such-compiler")


def refusal() -> str:
    with pytest.raises(RecipeError) as error:
        operator_set(CHOSEN, "cpu")
    return str(error.value)


@can
def test_without_a_compiler_it_is_refused_and_never_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_usable("attention", "tiles", "cpu")
    no_compiler(monkeypatch, tmp_path)
    assert not is_usable("attention", "tiles", "cpu")
    assert refusal() == ("operators.attention=tiles needs a C++ compiler that works (g++, or what the variable CXX "
                         "names), which this machine has not; provide it, or give operators.attention=auto")  # fmt: skip


@can
def test_what_has_been_compiled_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention_tiles.takes(*draw((1, 1, 1, 1, 16))[:3])
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert is_usable("attention", "tiles", "cpu")
    assert AttentionTiles().takes(*draw((1, 1, 1, 1, 16))[:3])


def test_a_processor_without_its_instructions_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: dict.fromkeys(AVX512_BF16.capabilities, True) | {"avx512_bf16": False}
    )
    assert not is_usable("attention", "tiles", "cpu")
    assert refusal().startswith("operators.attention=tiles needs a CPU with AVX512-BF16 instructions, which this machine has not")


def test_a_compiler_that_fails_is_said_once_and_torchs_kernel_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_compiler(monkeypatch, tmp_path)
    broken = AttentionTiles()
    monkeypatch.setattr(tiles, "attention_tiles", broken)
    monkeypatch.setattr(broken, "lacks", lambda: None)
    chosen = variant_of("attention", "tiles", "cpu")
    inputs = draw((1, 2, 1, 9, 16))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(chosen(*inputs[:3]), attention_kernel(*inputs[:3]))
    assert [record.getMessage() for record in caplog.records] == [
        "attention in tiles cannot be compiled (there is no C++ compiler); torch's kernel takes its place"
    ]


@can
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_a_library_that_does_not_work_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    inputs = draw((1, 1, 1, 9, 16))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not AttentionTiles().takes(*inputs[:3])
        assert "attention in tiles cannot be compiled (" in caplog.text
        with pytest.raises(RuntimeError, match="attention in tiles: "):
            attention_tiles(*inputs[:3])


@can
@pytest.mark.parametrize("shape", [(1, 2, 2, 5, 16), (1, 2, 1, 100, 48), (1, 1, 1, 700, 64), (1, 4, 2, 700, 64)], ids=str)
def test_the_predicted_workspace_is_what_it_takes(shape: tuple[int, ...]) -> None:
    _, heads, groups, length, width = shape
    recipe = small_recipe(
        model__heads=heads, model__kv_heads=groups, model__hidden=heads * width, data__sequence_length=length, comm__backend="gloo"
    )
    predicted = activations._tiles_workspace(work_of(recipe, recipe.validate(1)), heads > groups)
    assert predicted == pytest.approx(workspace_bytes(*draw(shape)[:2]), rel=0.01)


@can
def test_a_model_trains_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(attention_tiles, "run", lambda kernel, *given: asked.append(kernel) or AttentionTiles.run(
        attention_tiles, kernel, *given))  # fmt: skip
    model = {"model__hidden": 64, "model__heads": 4, "model__kv_heads": 2, "train__dtype": "bfloat16", "comm__backend": "simulated"}
    found, expected = (
        run("simulated", 2, train, small_recipe(**model, parallel__tensor=2, operators__attention=variant), 2)
        for variant in ("tiles", "kernel")
    )
    assert {"attention_forward", "attention_backward"} == set(asked)
    assert found[0].losses == pytest.approx(expected[0].losses, rel=1e-3)
