"""Makes the results of operators on tensors without values, those of equal calls without running the operator again.

Torch computes the shapes of such results in Python for many operators, which takes most of the time of a trace.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bagualu.trainer.simulation.operators import computes

_Make: TypeAlias = Callable[[list[Tensor]], Any]
"""Makes a part of a result, given the tensors among the arguments."""


class Results:
    """Runs operators, and of those whose result depends only on the shapes, strides and dtypes of their arguments, only the first
    of equal calls."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Make] = {}

    def of(self, func: Any, args: Sequence[Any], named: Mapping[str, Any], given: list[Tensor]) -> Any:
        """Returns the result of a call of `func`. `given`: the tensors among its arguments."""
        if not given or not computes(func) or not all(tensor.is_meta for tensor in given):
            return func(*args, **named)
        key = func, *map(_described, args), *((name, _described(value)) for name, value in named.items())
        if (make := self._known.get(key)) is None:
            result = func(*args, **named)
            if (make := _maker(result, given)) is not None:
                self._known[key] = make
            return result
        return make(given)


def _described(value: Any) -> Hashable:
    """Returns what a result may depend on of an argument."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value


def _maker(result: Any, given: list[Tensor]) -> _Make | None:
    """Returns a function that makes `result` anew; None if a part of it shares memory with `given` without being one of them, as a
    view does."""
    if isinstance(result, Tensor):
        for index, tensor in enumerate(given):
            if tensor is result:
                return lambda tensors: tensors[index]
        shared = {id(tensor.untyped_storage()) for tensor in given}
        if not result.is_meta or id(result.untyped_storage()) in shared:
            return None
        shape, stride, dtype = result.shape, result.stride(), result.dtype
        return lambda tensors: torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if isinstance(result, list | tuple):
        makers = [_maker(part, given) for part in result]
        whole = [maker for maker in makers if maker is not None]
        kind = type(result)
        return (lambda tensors: kind(maker(tensors) for maker in whole)) if len(whole) == len(makers) else None
    return lambda tensors: result
