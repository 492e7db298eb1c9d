"""A repeated call of an operator returns what carrying it out would return, without carrying it out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bagualu.trainer.simulation.repeated import Repeated

ATEN = torch.ops.aten


class Count(TorchDispatchMode):
    """Counts the operators that are carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def described(result: Any) -> Any:
    if isinstance(result, tuple | list):
        return [described(one) for one in result]
    return None if result is None else (result.shape, result.stride(), result.dtype, result.untyped_storage().nbytes())


CALLS: list[tuple[Any, Callable[[], tuple[list[Any], dict[str, Any]]]]] = [
    (ATEN.mm.default, lambda: ([meta(4, 8), meta(8, 2)], {})),
    (ATEN.mul.Tensor, lambda: ([meta(4, 8), meta(8, dtype=torch.float32)], {})),
    (ATEN.add.Tensor, lambda: ([meta(4, 8).t(), meta(8, 4)], {"alpha": 2})),
    (ATEN.native_layer_norm.default, lambda: ([meta(4, 8), [8], meta(8), meta(8), 1e-5], {})),
    (ATEN.native_dropout.default, lambda: ([meta(4, 8), 0.1, True], {})),
    (ATEN.sum.dim_IntList, lambda: ([meta(4, 8), [0]], {"dtype": torch.float32})),
]


@pytest.mark.parametrize(("func", "arguments"), CALLS, ids=[str(func) for func, _ in CALLS])
def test_a_second_call_makes_the_same_tensors_and_is_not_carried_out(func: Any, arguments: Any) -> None:
    repeated = Repeated()
    given, named = arguments()
    first = repeated.call(func, given, named)
    given, named = arguments()
    with Count() as count:
        second = repeated.call(func, given, named)
    assert described(second) == described(first) == described(func(*given, **named))
    assert str(func) not in count.calls


def test_calls_that_differ_in_a_number_or_a_shape_are_carried_out() -> None:
    repeated = Repeated()
    for given in ([meta(4, 8), [0]], [meta(4, 8), [1]], [meta(4, 6), [1]]):
        assert repeated.call(ATEN.sum.dim_IntList, given, {}).shape == ATEN.sum.dim_IntList(*given).shape


def test_what_is_changed_in_place_is_returned_itself() -> None:
    repeated = Repeated()
    for _ in range(2):
        own, out = meta(4), meta(4)
        assert repeated.call(ATEN.mul_.Tensor, [own, meta(4)], {}) is own
        assert repeated.call(ATEN.mul.out, [own, meta(4)], {"out": out}) is out


def test_a_view_shares_the_storage_of_its_argument_every_time() -> None:
    repeated = Repeated()
    for func in (ATEN.view.default, ATEN._unsafe_view.default, ATEN.detach.default):
        for _ in range(2):
            own = meta(4, 8)
            made = repeated.call(func, [own] if func is ATEN.detach.default else [own, [32]], {})
            assert made.untyped_storage() is own.untyped_storage()


def test_a_call_that_resizes_its_result_is_carried_out_every_time() -> None:
    repeated = Repeated()
    for _ in range(2):
        assert repeated.call(ATEN.mul.out, [meta(4), meta(4)], {"out": meta(0)}).shape == (4,)


def test_tensors_with_values_are_computed() -> None:
    repeated = Repeated()
    for value in (2.0, 3.0):
        assert repeated.call(ATEN.add.Tensor, [torch.tensor(value), 1], {}).item() == value + 1
