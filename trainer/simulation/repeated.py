"""Computes the shapes of an operator's results once for all calls with arguments of the same shapes.

For many operators torch computes the shapes of results in Python, which takes longer than all else in a trace.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

Made: TypeAlias = "int | tuple[torch.Size, tuple[int, ...], torch.dtype] | None"
"""A result: the position of the argument that it is, or shape, strides and dtype of a new tensor; None: no tensor."""


class Repeated:
    """Calls operators on tensors without values."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Made, ...] | None] = {}
        """For each call, its results; None: they must be computed again."""

    def call(self, func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Returns what func(*args, **named) returns. A call that is like an earlier one is not carried out."""
        written = _written(func)
        if written is None:
            return func(*args, **named)
        try:
            key = func, *map(_key, args), *((name, _key(value)) for name, value in named.items())
            known = self._known.get(key)
        except TypeError:  # an argument that cannot be compared
            return func(*args, **named)
        if known is None:
            before = [_key(value) for value in _all(args, named)]
            result = func(*args, **named)
            if key not in self._known:
                same = before == [_key(value) for value in _all(args, named)]
                self._known[key] = _made(result, written, func, args, named) if same else None
            return result
        made = tuple(_make(one, func, args, named) for one in known)
        return made if len(func._schema.returns) > 1 else made[0]


@lru_cache(None)
def _written(func: Any) -> tuple[int | None, ...] | None:
    """Returns for each result the position of the argument that it is, or None for a new tensor. None if the operator makes views,
    returns lists, or does what the shapes of its results do not show."""
    schema = func._schema
    if schema.name.startswith(("aten::set_", "aten::resize_", "aten::lift", "aten::detach", "prim::", "aten::_local_scalar")):
        return None
    if not schema.returns or any(str(value.type) != "Tensor" for value in schema.returns):
        return None
    positions: list[int | None] = []
    for value in schema.returns:
        if value.alias_info is None:
            positions.append(None)
        elif value.alias_info.is_write:
            sets = [argument.alias_info and argument.alias_info.before_set for argument in schema.arguments]
            positions.append(sets.index(value.alias_info.before_set))
        else:
            return None
    return tuple(positions)


def _key(value: Any) -> Any:
    """Returns what a call depends on of an argument. Raises TypeError for a tensor with values."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError("its value may count")
        return value.shape, value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    return value.__class__, value


def _all(args: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
    return [*args, *named.values()]


def _argument(position: int, func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    return args[position] if position < len(args) else named[func._schema.arguments[position].name]


def _made(
    result: Any, written: tuple[int | None, ...], func: Any, args: Sequence[Any], named: Mapping[str, Any]
) -> tuple[Made, ...] | None:
    results = result if isinstance(result, tuple) else (result,)
    given = {id(value.untyped_storage()) for value in _all(args, named) if isinstance(value, Tensor)}
    made: list[Made] = []
    for tensor, position in zip(results, written, strict=True):
        if tensor is None:
            made.append(None)
        elif position is not None:
            if tensor is not _argument(position, func, args, named):
                return None
            made.append(position)
        elif id(tensor.untyped_storage()) in given or not _fills_its_storage(tensor):
            return None
        else:
            made.append((tensor.shape, tensor.stride(), tensor.dtype))
    return tuple(made)


def _fills_its_storage(tensor: Tensor) -> bool:
    """Returns whether a tensor without values is like one that `torch.empty_strided` makes."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    elements = 1 + last if tensor.numel() else 0
    return tensor.is_meta and not tensor.storage_offset() and tensor.untyped_storage().nbytes() == elements * tensor.itemsize


def _make(made: Made, func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    if made is None:
        return None
    if isinstance(made, int):
        return _argument(made, func, args, named)
    shape, strides, dtype = made
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
