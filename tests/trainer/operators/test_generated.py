"""Kernels that torch's compiler generates, and what takes their place where it cannot. That they compute what they should is tested
in test_conformance.py."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bagualu.parallel.precision import accurate_dtype
from bagualu.trainer.costs.tensor_memory import TensorMemory
from bagualu.trainer.operators import kernel as kernel_module
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.generated import gate, loss, norm
from bagualu.trainer.operators.identity import identity_of
from bagualu.trainer.operators.kernel import Kernel, left_to_functions
from bagualu.trainer.operators.operator_set import operator_set
from bagualu.trainer.simulation.trace import Traced, trace
from tests.parity import small_recipe

COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="generating kernels needs a C++ compiler (g++ on PATH)")
GENERATED = OperatorsConfig().generated()


def double(x: torch.Tensor) -> torch.Tensor:
    return x + x


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))

    def as_one_kernel(self, kernel: Kernel, given: Sequence[Any]) -> Any:
        self.kernels.append(kernel.name)
        return kernel.function(*given)


def test_a_dispatch_mode_sees_a_kernel_as_one() -> None:
    with Seen() as seen:
        loss.loss_and_gradient(torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([True, True]), None)
        gate.silu_gate(torch.ones(2), torch.ones(2))
    assert seen.kernels == ["loss.loss_and_gradient", "gate.product"]


def test_they_are_traced_as_one_operator_that_makes_its_results_alone() -> None:
    recipe = small_recipe(comm__backend="gloo", train__compile=True, train__dtype="float32")
    traced = trace(recipe, 1, 0, Traced("cpu"))
    kernels = {one.name: one for one in traced.operators() if one.name.startswith("bagualu.")}
    assert {"bagualu.norm.scaled", "bagualu.norm.gradients", "bagualu.rotary.rotated", "bagualu.gate.product"} <= kernels.keys()
    product = kernels["bagualu.gate.product"]
    size = 4 * recipe.train.micro_batch * recipe.data.sequence_length * recipe.model.ffn
    assert (product.read_bytes, product.written_bytes, product.flops) == (2 * size, size, 0)
    assert {one.name for one in trace(small_recipe(comm__backend="gloo"), 1, 0, Traced("cpu")).operators()}.isdisjoint(kernels)


@COMPILER
def test_counting_memory_changes_neither_the_kernel_nor_its_bits() -> None:
    x, weight = torch.randn(64, 32, dtype=torch.bfloat16), torch.randn(32, dtype=torch.bfloat16)
    alone = norm.normalise(x, weight, 1e-6)
    with TensorMemory() as memory:
        counted = norm.normalise(x, weight, 1e-6)
    assert torch.equal(alone, counted)
    assert memory.bytes == x.nbytes
    assert memory.peak == x.nbytes + 4 * 64  # the result and 1 / length of each row, nothing between


FAILING = """
import torch
from bagualu.trainer.operators.generated import gate
x = torch.ones(4)
print(gate.silu_gate(x, x)[0].sum().item(), gate.silu_gate(x, x)[0].sum().item())
"""


def test_a_compiler_that_fails_leaves_the_function_and_one_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, check=True)
    first, second = map(float, done.stdout.split())
    assert first == second == pytest.approx(4 * 0.7310586)
    assert done.stderr.count("torch's compiler fails for gate.product") == 1


def test_a_mistake_in_a_function_is_no_failure_of_the_compiler() -> None:
    with pytest.raises(RuntimeError, match="size"):
        gate.silu_gate(torch.ones(2), torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        gate.silu_gate(torch.ones(2, 8), torch.ones(3, 8))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def kept(folder: Path) -> int:
    """How many kernels the folder has."""
    return len(list(folder.glob("code-*/call.py")))


def mixed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.float() * y.float() - torch.cat(y.float().chunk(2, -1)[::-1], -1)).to(x.dtype)


def total(x: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.float().sum(-1) * scale, x * scale


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def assert_as_the_function(kernel: Kernel, *given: Any) -> None:
    """The kernel's results have the function's values and strides."""
    got, expected = kernel(*given), kernel.function(*given)
    assert kernel.is_generated
    for one, other in zip(*((it if isinstance(it, tuple) else (it,)) for it in (got, expected)), strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other)


@COMPILER
def test_bits_are_those_of_torchs_own_way_to_call_the_compiler(folder: Path) -> None:
    for kernel, given in (
        (Kernel(norm._gradients.function), (bf16(6, 40), bf16(6, 40), bf16(40), torch.rand(6, 1))),
        (Kernel(mixed, all_sizes=True), (bf16(6, 40), bf16(6, 40))),
    ):
        got, expected = kernel(*given), torch.compile(kernel.function, fullgraph=True, dynamic=False)(*given)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@COMPILER
def test_one_kernel_takes_all_sizes_and_gives_the_bits_of_one_for_its_size_alone(folder: Path) -> None:
    kernel = Kernel(mixed, all_sizes=True)
    for sizes in ((3, 5), (2, 7), (9, 4)):
        x, y = bf16(*sizes, 6), bf16(*sizes, 6)
        assert_as_the_function(kernel, x, y)
        assert kept(folder) == 1
    assert torch.equal(kernel(x, y), Kernel(mixed)(x, y))
    assert kept(folder) == 2


@COMPILER
def test_sizes_that_are_equal_by_chance_are_not_taken_for_the_same(folder: Path) -> None:
    kernel = Kernel(mixed, all_sizes=True)
    for sizes in ((4, 4), (3, 4), (4, 3), (1, 4), (4, 1), (6, 4), (4, 6)):
        assert_as_the_function(kernel, bf16(*sizes, 6), bf16(*sizes[1:], 6))  # the second is used for each of the first's rows
    with pytest.raises(RuntimeError, match="size"):
        kernel(bf16(4, 5, 6), bf16(4, 6))


@COMPILER
def test_with_sums_each_size_has_a_kernel_of_its_own(folder: Path) -> None:
    kernel = Kernel(total)
    for number, rows in enumerate((3, 5, 8), 1):
        assert_as_the_function(kernel, bf16(rows, 6), 2.0)
        assert kept(folder) == number


@COMPILER
def test_numbers_and_the_number_of_threads_have_kernels_of_their_own(folder: Path) -> None:
    kernel, x, threads = Kernel(total), bf16(3, 6), torch.get_num_threads()
    assert_as_the_function(kernel, x, 2.0)
    assert_as_the_function(kernel, x, 3.0)
    assert kept(folder) == 2
    try:
        torch.set_num_threads(threads + 1)
        assert_as_the_function(kernel, x, 2.0)
    finally:
        torch.set_num_threads(threads)
    assert kept(folder) == 3


@COMPILER
@pytest.mark.parametrize(
    ("all_sizes", "all_pairs"),
    [(True, False), (False, False), *(pytest.param(each, True, marks=pytest.mark.slow) for each in (True, False))],
)
def test_tensors_may_lie_in_memory_as_they_like(folder: Path, all_sizes: bool, all_pairs: bool) -> None:
    """Such as slices that begin at an odd element, every other row, parts of wider rows, transposed and expanded tensors, and the
    same tensor twice, before and after others. Each of them is given as one of the two arguments, or as either with `all_pairs`."""
    kernel = Kernel(mixed, all_sizes)
    x, y, wide = bf16(4, 3, 6), bf16(4, 3, 6), bf16(4, 3, 20)
    odd = bf16(4 * 3 * 6 + 1)[1:].view(4, 3, 6)
    assert odd.data_ptr() % 4 == 2
    lie = [x, odd, bf16(8, 3, 6)[::2], wide[..., 1:7], bf16(3, 4, 6).transpose(0, 1), bf16(4, 6, 3).mT, bf16(3, 6).expand(4, 3, 6)]
    assert_as_the_function(kernel, x, x)
    for number, one in enumerate(lie):
        if all_pairs or number % 2 == all_sizes:
            assert_as_the_function(kernel, one, y)
        if all_pairs or number % 2 != all_sizes:
            assert_as_the_function(kernel, y, one)
    assert_as_the_function(kernel, wide.chunk(2, -1)[0], wide.chunk(2, -1)[1])
    assert_as_the_function(kernel, y, y)
    assert_as_the_function(kernel, torch.nn.Parameter(x), y)
    assert not kernel(torch.nn.Parameter(x), y).requires_grad


@COMPILER
def test_parts_of_wider_rows_have_a_kernel_for_all_sizes_too(folder: Path) -> None:
    kernel = Kernel(mixed, all_sizes=True)
    for sizes in ((3, 5), (2, 7)):
        wide, heads = bf16(*sizes, 20), bf16(*sizes, 3 * 24)[..., 24:48].unflatten(-1, (4, 6))
        assert_as_the_function(kernel, wide[..., :10], wide[..., 10:])
        assert_as_the_function(kernel, heads, bf16(*sizes, 4, 6))
    assert kept(folder) == 2


@COMPILER
def test_threads_may_call_a_kernel_at_once_and_it_is_generated_once(folder: Path) -> None:
    kernel, other, x = Kernel(total), Kernel(mixed), bf16(64, 6)
    with ThreadPoolExecutor(8) as threads:
        both = list(threads.map(lambda _: (kernel(x, 2.0)[0], other(x, x)), range(8)))
    assert kept(folder) == 2
    for sums, product in both:
        assert torch.equal(sums, kernel(x, 2.0)[0])
        assert torch.equal(product, other(x, x))


@COMPILER
def test_beyond_a_number_of_shapes_the_function_computes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernel_module, "_MOST_FORMS", 1)
    kernel = Kernel(total)
    for rows in (2, 3, 4):
        assert kernel(bf16(rows, 6), 1.0)[0].shape == (rows,)
    assert not kernel.is_generated
    assert [one.message.split(" (")[0] for one in caplog.records if one.levelname == "WARNING"] == [
        "torch's compiler fails for test_generated.total"
    ]


LATER = """
import hashlib, sys, torch
from bagualu.trainer.operators.generated import gate, loss, norm, rotary
torch.manual_seed(1)
x, weight, cos = torch.randn(2, 8, 4, 16).bfloat16(), torch.randn(16).bfloat16(), torch.randn(8, 16)
leaves = [x.requires_grad_(), weight.requires_grad_()]
y = rotary.rotate(norm.normalise(x, weight, 1e-6), cos, cos)
y = gate.silu_gate(y, x)[0]
value, slope = loss.loss_and_gradient(y.detach().flatten(0, 2), torch.arange(64) % 16, torch.ones(64, dtype=torch.bool), None)
grads = torch.autograd.grad(y, leaves, slope.view_as(y))
bits = b"".join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in (y, value.view(1), slope, *grads))
print(hashlib.sha256(bits).hexdigest(), *(name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules))
"""


def later(**environment: str) -> tuple[str, list[str], str]:
    """What a fresh process computes with generated kernels: a hash of the bits, what it loads of the compiler, and what it says."""
    done = subprocess.run(
        [sys.executable, "-c", LATER], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    bits, *loaded = done.stdout.split()
    return bits, loaded, done.stderr


@COMPILER
def test_a_later_process_computes_the_same_bits_without_the_compiler(folder: Path) -> None:
    bits, loaded, said = later()
    assert (loaded, said) == (["torch._dynamo", "torch._inductor"], "")
    assert kept(folder) == 7
    assert later(CXX="/bin/false") == (bits, [], "")
    next(folder.glob("code-*/0.so")).write_bytes(b"damaged")
    again, loaded, said = later()
    assert (again, said) == (bits, "")
    assert "torch._inductor" in loaded
    assert later(CXX="/bin/false") == (bits, [], "")


UPDATES = """
import sys, torch
from bagualu.trainer.operators.generated.update import adamw
weight, gradient = torch.linspace(-1, 1, 200), torch.linspace(2, -1, 200)
working, average, square = weight.bfloat16(), torch.zeros(200), torch.zeros(200)
for count in (1, 2, 3):
    step, rate = torch.tensor(float(count)), 0.01 * count
    adamw(weight, working, gradient.clone(), average, square, step, 0.5, rate, 0.1 * count, (0.9, 0.95), 1e-8)
print(*(t.double().sum().item() for t in (weight, working, average, square)), "torch._inductor" in sys.modules)
"""


def updates(**environment: str) -> tuple[list[float], str, str]:
    """What a fresh process computes in three updates, whether it loads the compiler, and what it says."""
    done = subprocess.run(
        [sys.executable, "-c", UPDATES], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    *sums, loaded = done.stdout.split()
    return list(map(float, sums)), loaded, done.stderr


@COMPILER
def test_an_update_is_compiled_once_and_never_done_by_the_function_in_its_place(folder: Path, tmp_path: Path) -> None:
    """Rates, decay and corrections of moments differ from step to step, and nothing is compiled anew for it."""
    first, loaded, said = updates()
    assert (loaded, said) == ("True", "")
    assert kept(folder) == 1
    assert updates(CXX="/bin/false") == (first, "False", "")
    with pytest.raises(subprocess.CalledProcessError) as error:
        updates(CXX="/bin/false", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "another"))
    assert "RecipeError: torch's compiler fails for operators.update=generated (" in error.value.stderr
    assert "); mend it, or resume with another variant of update" in error.value.stderr


def test_an_update_is_traced_as_one_operator_that_writes_in_place() -> None:
    recipe = small_recipe(comm__backend="gloo", train__dtype="bfloat16", operators__update="generated")
    traced = trace(recipe, 1, 0, Traced("cpu"))
    found = [one for one in traced.operators() if one.name == "bagualu.update.update_and_round"]
    elements = sum(one.written_bytes for one in found) / (3 * 4 + 2)  # weight and two moments, and working weights
    read = sum(one.read_bytes for one in found) / elements
    assert elements % 64 == 0
    assert 4 * 4 <= read < 4 * 4 + 2.5, read  # those and the gradient; the trace counts working weights as read too


@COMPILER
def test_code_is_not_taken_for_other_settings_of_the_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = bf16(4, 32), bf16(4, 32)
    for settings, files in (({}, 1), ({"TORCHINDUCTOR_FREEZING": "1"}, 2), ({}, 2)):
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            assert_as_the_function(Kernel(mixed), x, y)
        assert kept(folder) == files


@COMPILER
def test_code_of_a_function_that_has_changed_since_is_not_taken(folder: Path) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x * by

    def called(x: torch.Tensor) -> torch.Tensor:
        return function(x)

    for by in (2.0, 3.0):
        for one in (function, called, partial_of(by)):
            assert torch.equal(Kernel(one)(torch.ones(8)), torch.full((8,), by))
    assert identity_of(accurate_dtype) != identity_of(double)
    assert any("HALF = (torch.bfloat16, torch.float16)" in part for part in identity_of(mixed_widely))
    with pytest.raises(TypeError, match="uses os"):
        identity_of(lambda: os.getpid())


def partial_of(by: float) -> Any:
    def function(x: torch.Tensor, by: float = by) -> torch.Tensor:
        return x * by

    return function


def mixed_widely(x: torch.Tensor) -> torch.Tensor:
    return x.to(accurate_dtype(x.dtype))


def test_kernels_can_be_left_to_their_functions(folder: Path) -> None:
    kernel = Kernel(double)
    with left_to_functions():
        assert kernel(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert not kernel.is_generated
    assert kept(folder) == 0


@COMPILER
def test_tensors_of_other_classes_are_left_to_the_function() -> None:
    class Named(torch.Tensor):
        pass

    assert type(Kernel(double)(torch.ones(3).as_subclass(Named))) is Named


def test_what_a_generated_variant_does_not_take_is_the_defaults() -> None:
    operators = operator_set(GENERATED, "cpu")
    x, weight = torch.randn(2, 4), torch.randn(4)
    expected = torch.nn.functional.layer_norm(x, (4,), weight, weight, 1e-5)
    torch.testing.assert_close(operators.norm(x, weight, 1e-5, weight), expected)
    assert GENERATED.attention == "auto"
