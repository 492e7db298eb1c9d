"""The graph of a step, the chains of operators in it that one kernel can compute, and what that saves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bagualu.comm.topology import Chip
from bagualu.parallel.config import ParallelConfig
from bagualu.parallel.simulation.operator_cost import operator_seconds
from bagualu.trainer.operators.kernel import kernel
from bagualu.trainer.recipe.changed import changed
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.fusion import Chain, chains_of, fusion_of, graph_of
from bagualu.trainer.simulation.gain import gain_alone, one_micro_batch, over_layers
from bagualu.trainer.simulation.step_graph import OPERATOR, StepGraph
from bagualu.trainer.simulation.trace import Traced, trace
from tests.parity import small_recipe

ROWS, WIDTH = 8, 16
SIZE = ROWS * WIDTH * 4
"""The bytes of a tensor of the tests."""
CPU = Chip("CPU", "", dict.fromkeys(("bfloat16", "float32", "float64"), 1e11), 2**34, 2e10, 4e-6, 0, type="cpu")


@contextmanager
def graphed() -> Iterator[StepGraph]:
    with StepGraph("cpu", nullcontext, lambda: 0) as graph:
        yield graph


def chains(function: Callable[[Tensor], object]) -> list[Chain]:
    x = torch.empty(ROWS, WIDTH, device="meta")
    with graphed() as graph:
        kept = function(x)
    del kept
    return chains_of(graph.graph)


def names(chain: Chain) -> list[str]:
    return [one.name.removeprefix("aten.").partition(".")[0] for one in chain.operators]


def test_operators_in_a_row_are_a_chain_that_passes_on_results_without_memory() -> None:
    (chain,) = chains(lambda x: ((x * 2).exp() + 1).neg())
    assert names(chain) == ["mul", "exp", "add", "neg"]
    assert chain.kept_bytes == 3 * 2 * SIZE  # three results, each written and read


def test_a_result_that_others_read_is_written_though_not_read_back() -> None:
    def function(x: Tensor) -> object:
        doubled = x * 2
        return doubled @ doubled.T, doubled.exp()

    (chain,) = chains(function)
    assert names(chain) == ["mul", "exp"]
    assert chain.kept_bytes == SIZE


def test_no_chain_waits_for_a_product_of_its_own_results() -> None:
    def function(x: Tensor) -> object:
        doubled = x * 2
        return doubled + (doubled @ torch.empty(WIDTH, WIDTH, device="meta"))

    assert chains(function) == []  # the sum needs the product, which needs what is doubled


def test_no_two_chains_wait_for_each_other() -> None:
    weight = torch.empty(WIDTH, WIDTH, device="meta")

    def function(x: Tensor) -> object:
        first, other = x * 2, x.neg()
        first_on, other_on = first.exp() + other @ weight, other.exp()
        return first_on, other_on + first @ weight

    found = chains(function)
    assert sorted(map(names, found)) == [["mul", "exp", "add"], ["neg", "exp"]]  # the last sum would make each wait for the other


def test_views_and_operators_in_place_are_what_they_are_views_of() -> None:
    def function(x: Tensor) -> object:
        halved = (x / 2).view(2, -1, WIDTH)
        halved.add_(1)
        return halved.flatten(0, 1).exp()

    (chain,) = chains(function)
    assert names(chain) == ["div", "add_", "exp"]
    assert chain.kept_bytes == 2 * 2 * SIZE


def test_sums_of_rows_are_in_the_chain_of_what_they_add_up_and_scale() -> None:
    (chain,) = chains(lambda x: x * (x * x).mean(-1, keepdim=True).rsqrt())
    assert names(chain) == ["mul", "mean", "rsqrt", "mul"]
    assert chain.kept_bytes == 2 * SIZE + 2 * 2 * 4 * ROWS


def test_loops_over_other_elements_are_other_chains() -> None:
    assert chains(lambda x: (x * 2)[:, :3].exp()) == []


def test_a_generated_kernel_is_a_chain_of_its_own() -> None:
    @kernel
    def doubled(x: Tensor) -> Tensor:
        return (x + x).exp()

    found = chains(lambda x: (doubled(x * 3) + 1).neg())
    assert [(names(chain), chain.kernel) for chain in found] == [
        (["add", "exp"], "test_fusion.doubled"),
        (["add", "neg"], None),
    ]


def test_one_kernel_takes_less_time_than_its_operators_by_their_traffic_and_calls() -> None:
    (chain,) = chains(lambda x: (x * 2).exp())
    per_byte = 1 / CPU.memory_bytes_per_second
    assert chain.seconds(CPU) == pytest.approx(4 * SIZE * per_byte + 2 * CPU.launch_seconds)
    assert chain.saved_seconds(CPU) == pytest.approx(2 * SIZE * per_byte + CPU.launch_seconds)


def of_step(recipe: Recipe) -> tuple[float, float]:
    """Seconds of a step with generated kernels: by its graph with kernels fused, and by the trace with kernels as operators."""
    graph = graph_of(recipe, 1, Traced(chip="cpu"))
    separate = sum(operator_seconds(CPU, node.meta[OPERATOR]) for node in graph.nodes if node.meta)
    fused = separate - sum(chain.saved_seconds(CPU) for chain in chains_of(graph) if chain.kernel)
    compiled = trace(changed(recipe, {"train.compile": True}), 1, 0, Traced(chip="cpu"))
    return fused, sum(operator_seconds(CPU, one) for one in compiled.operators())


@pytest.mark.parametrize("changes", [{}, {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2}])
def test_the_graph_and_the_trace_of_a_step_agree_on_its_kernels(changes: dict[str, object]) -> None:
    fused, compiled = of_step(small_recipe(train__dtype="bfloat16", data__sequence_length=64, **changes))
    assert fused == pytest.approx(compiled, rel=0.02)


def bench_dense(*words: str) -> Recipe:
    return compose(["recipe=bench_dense", "model.layers=2", *words])


def test_no_chain_of_a_dense_model_is_worth_a_kernel_that_there_is_not() -> None:
    fusion = fusion_of(bench_dense(), CPU)
    assert set(fusion.saved) == {"norm", "rotary", "gate", "loss"}
    assert sum(fusion.left.values()) < 0.005


def test_a_kernel_that_is_missing_is_found() -> None:
    complete, fusion = (fusion_of(bench_dense(*words), CPU) for words in ([], ["operators.rotary=eager"]))
    assert complete.saved.keys() - fusion.saved.keys() == {"rotary"}
    found = {name: fusion.left[name] for name in fusion.left.keys() - complete.left.keys()}
    assert sum(found.values()) > 0.2 * complete.saved["rotary"]  # the eager variant has fewer operators than the kernel's function


def test_kernels_save_more_of_a_step_where_memory_is_slower_or_products_are_quicker() -> None:
    recipe = bench_dense()
    usual = gain_alone(recipe, CPU)
    assert 0 < usual < 0.1
    assert gain_alone(recipe, replace(CPU, memory_bytes_per_second=1e10)) > usual
    assert gain_alone(recipe, replace(CPU, matmul_flops_per_second={"bfloat16": 5e11, "float32": 5e11})) > usual


def test_models_of_many_layers_are_predicted_by_those_of_few() -> None:
    def seconds(recipe: Recipe) -> dict[str, float]:
        return {"step": sum(operator_seconds(CPU, one) for one in trace(recipe, 1, 0, Traced(chip="cpu")).operators())}

    every = {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2, "model__layers": 6}
    for changes in (every, {"model__layers": 5, "model__window": 4, "model__full_attention_every": 2}):
        recipe = one_micro_batch(small_recipe(**changes), ParallelConfig())
        assert over_layers(recipe, seconds)["step"] == pytest.approx(seconds(recipe)["step"], rel=0.01)


def test_a_gain_is_that_of_a_rank_alone_whatever_the_layout_and_what_no_trace_has() -> None:
    alone = gain_alone(small_recipe(), CPU)
    assert alone > 0
    auto = {"train__recompute": "auto", "parallel__memory_bytes": 10**9}
    for changes in (auto, {"parallel__tensor": 2, "optim__name": "muon"}, {"train__offload_bytes": 1000, "parallel__data": 2}):
        assert gain_alone(small_recipe(**changes), CPU) == alone
