"""Describes the operators that torch runs: their shapes, dtypes, bytes and FLOPs."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bagualu.parallel.simulation.events import Operator, TensorType
from bagualu.trainer.simulation.flops import flops_of

_OVERWRITES = ("aten::copy_", "aten::zero_", "aten::fill_")
"""In-place operators that do not read what they write to."""
_COMPUTE_NOTHING = (
    *("aten::empty", "aten::new_empty", "aten::detach", "aten::lift_fresh", "aten::_unsafe_view", "aten::squeeze_"),
    *("aten::unsqueeze_", "aten::transpose_", "aten::set_", "aten::resize_", "prim::"),
)
"""The beginnings of the names of operators that only make views, besides those that say so, or only allocate."""


class Operators:
    """Describes operators; equal ones are one object."""

    def __init__(self) -> None:
        self._known: dict[Any, Operator] = {}

    def of(
        self,
        func: Any,
        args: Sequence[Any],
        named: Mapping[str, Any],
        result: Any,
        given: list[Tensor],
        made: list[Tensor],
    ) -> Operator:
        """Returns the description of a call of `func`. `given`: the tensors among its arguments; `made`: those of its
        result."""
        flags = tuple(arg for arg in args if isinstance(arg, bool))
        key = func, flags, *((tensor.dtype, tensor.shape, tensor.stride()) for tensor in (*given, *made))
        if (known := self._known.get(key)) is None:
            reads, writes = read_and_written(func, args, named)
            known = self._known[key] = Operator(
                name=str(func),
                inputs=tuple(map(_type_of, given)),
                outputs=tuple(map(_type_of, made)),
                read_bytes=sum(map(bytes_of, reads)),
                written_bytes=sum(map(bytes_of, writes or made)),
                flops=flops_of(func, args, named, result),
            )
        return known


class EachOperator(TorchDispatchMode):
    """Within this context, passes each operator of the thread to `seen`, with the seconds that its call took."""

    def __init__(self, seen: Callable[[Operator, float], None]) -> None:
        super().__init__()
        self._seen, self._operators = seen, Operators()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        started = time.perf_counter()
        result = func(*args, **named)
        seconds = time.perf_counter() - started
        if computes(func):
            given, made = [*tensors_in(args), *tensors_in(named.values())], list(tensors_in((result,)))
            self._seen(self._operators.of(func, args, named, result, given, made), seconds)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns that torch need not import its compiler to keep it from compiling this class."""
        return False


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yields the tensors among `values` and in lists in them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_in(value)


def _type_of(tensor: Tensor) -> TensorType:
    return TensorType(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def bytes_of(tensor: Tensor) -> int:
    """Returns the bytes of the elements of `tensor`; of expanded elements once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


@lru_cache(None)
def computes(func: Any) -> bool:
    """Returns whether an operator runs a kernel: it neither only makes a view nor only allocates."""
    name = func._schema.name
    views = [value for value in func._schema.returns if value.alias_info is not None and not value.alias_info.is_write]
    return not views and not name.startswith(_COMPUTE_NOTHING)


def read_and_written(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the arguments that an operator reads, and those that it changes."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    overwrites = func._schema.name in _OVERWRITES
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else named.get(argument.name)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        tensors = list(tensors_in((value,)))
        writes += tensors if changed else []
        reads += [] if changed and (overwrites or argument.is_out) else tensors
    return reads, writes


def generated(name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> Operator:
    """Returns the kernel that is generated from the function `name` (trainer/operators/generated), given its inputs and results."""
    return Operator(
        f"bagualu.{name}",
        tuple(map(_type_of, given)),
        tuple(map(_type_of, made)),
        sum(map(bytes_of, given)),
        sum(map(bytes_of, made)),
        0,
    )
