"""Kernels that torch's compiler generates, and what takes their place where it cannot. That they compute what they should is tested
in test_conformance.py."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bagualu.trainer.costs.tensor_memory import TensorMemory
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.generated import gate, loss, norm
from bagualu.trainer.operators.kernel import Kernel
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


def test_what_a_generated_variant_does_not_take_is_the_defaults() -> None:
    operators = operator_set(GENERATED, "cpu")
    x, weight = torch.randn(2, 4), torch.randn(4)
    expected = torch.nn.functional.layer_norm(x, (4,), weight, weight, 1e-5)
    torch.testing.assert_close(operators.norm(x, weight, 1e-5, weight), expected)
    assert GENERATED.attention == "auto"
