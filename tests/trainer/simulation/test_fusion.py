"""The graph of a step, the chains of operators in it that one kernel can compute, and what that saves."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor

from bagualu.comm.topology import Chip, ShapeEfficiency
from bagualu.parallel.config import ParallelConfig
from bagualu.parallel.simulation.operator_cost import operator_seconds
from bagualu.trainer.operators.kernel import kernel
from bagualu.trainer.recipe.changed import changed
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.fusion import Chain, chains_of, fusion_of, graph_of
from bagualu.trainer.simulation.gain import one_data_rank, over_layers, seconds_saved
from bagualu.trainer.simulation.results import Results
from bagualu.trainer.simulation.step_graph import StepGraph
from bagualu.trainer.simulation.trace import Traced, Tracer, trace
from tests.parity import small_recipe

ROWS, WIDTH = 8, 16
SIZE = ROWS * WIDTH * 4
"""The bytes of a tensor of the tests."""
CPU = Chip(
    *("CPU", "", dict.fromkeys(("bfloat16", "float32", "float64"), 1e11), 2**34, 2e10, 4e-6, 0),
    efficiency={"bfloat16": (ShapeEfficiency(4096, 4096, 4096, 1.0),)},
    type="cpu",
)  # fmt: skip


def chains(function: Callable[[Tensor], object], columns: int = WIDTH, place: Callable[[], int] = lambda: 0) -> list[Chain]:
    """The chains of a function of x [ROWS, columns]. `place`: as for `StepGraph`."""
    x = torch.empty(ROWS, columns, device="meta")
    with StepGraph(Tracer("cpu", Results()), place) as graph:
        kept = function(x)
    del kept
    return chains_of(graph.graph)


def names(chain: Chain) -> list[str]:
    return [one.operator.name.removeprefix("aten.").partition(".")[0] for one in chain.calls]


def passed_on(chain: Chain) -> int:
    """The bytes that the operators of a chain read and write, and its kernel does not."""
    moved = sum(one.operator.read_bytes + one.operator.written_bytes for one in chain.calls)
    return moved - chain.read_bytes - chain.written_bytes


def test_operators_in_a_row_are_a_chain_that_passes_on_results_without_memory() -> None:
    (chain,) = chains(lambda x: ((x * 2).exp() + 1).neg())
    assert names(chain) == ["mul", "exp", "add", "neg"]
    assert passed_on(chain) == 3 * 2 * SIZE  # three results, each written and read


def test_a_result_that_others_read_is_written_though_not_read_back() -> None:
    def function(x: Tensor) -> object:
        doubled = x * 2
        return doubled @ doubled.T, doubled.exp()

    (chain,) = chains(function)
    assert names(chain) == ["mul", "exp"]
    assert passed_on(chain) == SIZE


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


def test_a_chain_that_grows_later_may_be_waited_for_too() -> None:
    weight, other = torch.empty(WIDTH, WIDTH, device="meta"), torch.empty(ROWS, WIDTH, device="meta")

    def function(x: Tensor) -> object:
        first = x + 1
        product = first @ weight
        doubled = other * 2
        return first + doubled, doubled + product

    assert list(map(names, chains(function))) == [["add", "add"]]


def test_views_and_operators_in_place_are_what_they_are_views_of() -> None:
    def function(x: Tensor) -> object:
        halved = (x / 2).view(2, -1, WIDTH)
        halved.add_(1)
        return halved.flatten(0, 1).exp()

    (chain,) = chains(function)
    assert names(chain) == ["div", "add_", "exp"]
    assert passed_on(chain) == 2 * 2 * SIZE


def test_sums_of_rows_are_in_the_chain_of_what_they_add_up_and_scale() -> None:
    (chain,) = chains(lambda x: x * (x * x).mean(-1, keepdim=True).rsqrt())
    assert names(chain) == ["mul", "mean", "rsqrt", "mul"]
    assert passed_on(chain) == 2 * SIZE + 2 * SIZE + 2 * 2 * 4 * ROWS  # x is read once in place of three times


def test_what_is_known_only_after_all_rows_ends_a_chain() -> None:
    for columns in (WIDTH, ROWS):
        (chain,) = chains(lambda x: x * (x * 2).sum(0), columns)
        assert names(chain) == ["mul", "sum"]
        (chain,) = chains(lambda x: x / (x * 2).sum(), columns)
        assert names(chain) == ["mul", "sum"]


def test_a_communication_ends_a_chain() -> None:
    assert len(chains(lambda x: (x * 2).exp())) == 1
    communications = count()  # one before each operator
    assert chains(lambda x: (x * 2).exp(), place=lambda: next(communications)) == []


def test_memory_that_is_older_than_the_step_is_written() -> None:
    weight = torch.empty(ROWS, WIDTH, device="meta")
    (chain,) = chains(lambda x: weight.copy_(x).sum())
    assert names(chain) == ["copy_", "sum"]
    assert passed_on(chain) == SIZE  # what is added up is not read back


def test_parts_of_one_buffer_are_not_taken_for_each_other() -> None:
    other = torch.empty(ROWS, WIDTH, device="meta")

    def function(x: Tensor) -> object:
        buffer = x.new_empty(2 * ROWS, WIDTH)
        first, second = buffer[:ROWS], buffer[ROWS:]
        first.copy_(x)
        second.copy_(other)
        return first.exp(), second.neg(), buffer @ buffer.T

    assert sorted(map(names, chains(function))) == [["copy_", "exp"], ["copy_", "neg"]]


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


def kernels_of(recipe: Recipe) -> tuple[dict[str, list[tuple[int, int]]], dict[str, list[tuple[int, int]]]]:
    """The bytes that each call of each generated kernel reads and writes in a step: by its function's operators in the graph, and
    by the trace, in which it is one operator."""
    by_graph, by_trace = defaultdict(list), defaultdict(list)
    for chain in chains_of(graph_of(recipe, 1, Traced(chip="cpu"))[0]):
        if chain.kernel is not None:
            by_graph[chain.kernel].append((chain.read_bytes, chain.written_bytes))
    for one in trace(changed(recipe, {"train.compile": True}), 1, 0, Traced(chip="cpu")).operators():
        if one.name.startswith("bagualu."):
            by_trace[one.name.removeprefix("bagualu.")].append((one.read_bytes, one.written_bytes))
    return by_graph, by_trace


@pytest.mark.parametrize("changes", [{}, {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2}])
def test_the_graph_and_the_trace_of_a_step_agree_on_the_memory_traffic_of_its_kernels(changes: dict[str, object]) -> None:
    by_graph, by_trace = kernels_of(small_recipe(train__dtype="bfloat16", data__sequence_length=64, **changes))
    assert by_graph == by_trace
    assert {name.partition(".")[0] for name in by_trace} == {"norm", "rotary", "gate", "loss"}


def bench_dense(*words: str) -> Recipe:
    return compose(["recipe=bench_dense", "model.layers=2", *words])


def test_no_chain_of_a_dense_model_is_worth_a_kernel_that_there_is_not() -> None:
    fusion = fusion_of(bench_dense(), CPU, 8)
    assert set(fusion.saved) == {"norm", "rotary", "gate", "loss"}
    assert sum(fusion.left.values()) < 0.01


def test_a_kernel_that_is_missing_is_found() -> None:
    complete, fusion = (fusion_of(bench_dense(*words), CPU) for words in ([], ["operators.rotary=eager"]))
    assert complete.saved.keys() - fusion.saved.keys() == {"rotary"}
    found = {name: fusion.left[name] for name in fusion.left.keys() - complete.left.keys()}
    assert sum(found.values()) > 0.2 * complete.saved["rotary"]  # the eager variant has fewer operators than the kernel's function


def test_kernels_save_more_of_a_step_where_memory_is_slower_and_there_are_more_tokens() -> None:
    recipe = bench_dense()
    usual = seconds_saved(recipe, CPU, 4)
    assert usual > 0
    assert seconds_saved(recipe, replace(CPU, memory_bytes_per_second=CPU.memory_bytes_per_second / 2), 4) > 1.5 * usual
    assert seconds_saved(recipe, CPU, 8) == pytest.approx(2 * usual, rel=0.1)


def test_batches_and_models_of_many_layers_are_predicted_by_few() -> None:
    def seconds(recipe: Recipe) -> dict[str, float]:
        return {"step": sum(operator_seconds(CPU, one) for one in trace(recipe, 1, 0, Traced(chip="cpu")).operators())}

    every = {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2, "model__layers": 6}
    for changes in (every, {"model__layers": 6, "model__window": 4, "model__full_attention_every": 2}):
        recipe = one_data_rank(small_recipe(**changes), ParallelConfig())
        whole = changed(recipe, {"data.global_batch": 4 * recipe.data.global_batch})
        assert over_layers(recipe, 4, seconds)["step"] == pytest.approx(seconds(whole)["step"], rel=0.01)


def test_what_is_saved_is_that_of_a_rank_alone_whatever_the_layout_and_what_no_trace_has() -> None:
    alone = seconds_saved(small_recipe(), CPU, 1)
    assert alone > 0
    for changes in (
        {"train__recompute": "auto", "parallel__memory_bytes": 10**9},
        {"parallel__tensor": 2, "optim__name": "muon"},
        {"train__offload_bytes": 1000, "parallel__data": 2, "faults": ["kill@step=5:rank=1"]},
        {"parallel__data": 8, "restart__min_workers": 4, "optim__groups": [{"pattern": "*.norm", "lr": 1e-4}]},
    ):
        assert seconds_saved(small_recipe(**changes), CPU, 1) == alone
