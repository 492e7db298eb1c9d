"""Results of operators without values that are made anew are those that torch computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.simulation.results import Results
from bagualu.trainer.simulation.trace import Traced, trace

_ATEN = torch.ops.aten


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def twice(func: Any, *args: Any, **named: Any) -> tuple[list[Any], int]:
    """The results of two equal calls, and how often the operator ran for them."""
    runs = 0

    class Counted:
        _schema = func._schema

        def __call__(self, *arguments: Any, **others: Any) -> Any:
            nonlocal runs
            runs += 1
            return func(*arguments, **others)

    results, operator = Results(), Counted()
    given = [value for value in (*args, *named.values()) if isinstance(value, Tensor)]
    return [results.of(operator, args, named, given) for _ in range(2)], runs


@pytest.mark.parametrize(
    "call",
    [
        lambda: (_ATEN.mm.default, empty(4, 6), empty(6, 8)),
        lambda: (_ATEN.add.Tensor, empty(4, 6).t(), empty(6, 1)),
        lambda: (_ATEN.mul.Tensor, empty(4, dtype=torch.int64), 2.5),
        lambda: (_ATEN._to_copy.default, empty(4, 6).t()),
        lambda: (_ATEN.topk.default, empty(4, 6), 2),
        lambda: (_ATEN._scaled_dot_product_flash_attention.default, *(empty(1, 2, 16, 8, dtype=torch.float16) for _ in range(3))),
    ],
)
def test_a_result_has_the_shapes_strides_and_dtypes_of_the_operator(call: Callable[[], Any]) -> None:
    func, *args = call()
    (first, second), runs = twice(func, *args)
    assert runs == 1
    pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
    for ran, made in pairs:
        if isinstance(ran, Tensor):
            assert (made.shape, made.stride(), made.dtype, made.device) == (ran.shape, ran.stride(), ran.dtype, ran.device)
            assert made.untyped_storage().nbytes() == ran.untyped_storage().nbytes()
            assert made is not ran
        else:
            assert made == ran


def test_other_numbers_and_kinds_of_numbers_are_other_calls() -> None:
    results, given = Results(), empty(4, dtype=torch.int64)
    dtypes = [results.of(_ATEN.mul.Tensor, (given, factor), {}, [given]).dtype for factor in (2, 2.0, 2)]
    assert dtypes == [torch.int64, torch.float32, torch.int64]


def test_an_operator_in_place_returns_the_tensor_it_is_given() -> None:
    one, other = empty(4), empty(4)
    results = Results()
    assert results.of(_ATEN.add_.Tensor, (one, other), {}, [one, other]) is one
    assert results.of(_ATEN.add_.Tensor, (other, one), {}, [other, one]) is other
    left, right = empty(4, 4), empty(4, 4)
    for out in (empty(4, 4), empty(4, 4)):
        assert results.of(_ATEN.mm.out, (left, right), {"out": out}, [left, right, out]) is out


def test_views_are_made_by_torch() -> None:
    for func, *args in ((_ATEN.t.default, empty(4, 6)), (_ATEN._unsafe_view.default, empty(4, 6), [24])):
        made, runs = twice(func, *args)
        assert runs == 2
        assert all(result.untyped_storage() is args[0].untyped_storage() for result in made)


@pytest.mark.parametrize("chip", ["cpu", "cuda"])
def test_a_trace_is_the_same_if_every_operator_runs(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["data.source=random", "data.sequence_length=32", "data.global_batch=4", "parallel.data=2", "parallel.zero=3"]
    recipe = compose(["recipe=moe_tiny", *words, "parallel.expert=2", "train.dtype=bfloat16"])
    made = trace(recipe, 2, 1, Traced(chip))
    monkeypatch.setattr(Results, "of", lambda self, func, args, named, given: func(*args, **named))
    assert made == trace(recipe, 2, 1, Traced(chip))


def test_traces_that_share_results_are_the_same_and_run_no_operator_again() -> None:
    recipe = compose(["recipe=tiny_dense", "data.source=random", "data.sequence_length=32", "data.global_batch=4"])
    shared = Traced("cuda", results=Results())
    first, known = trace(recipe, 1, 0, shared), len(shared.results._known)
    assert known
    assert trace(recipe, 1, 0, shared) == first == trace(recipe, 1, 0, Traced("cuda"))
    assert len(shared.results._known) == known
