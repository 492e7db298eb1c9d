"""The code of a function, which tells whether what was generated from it in an earlier process still computes the same."""

from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch


def identity_of(function: Callable[..., Any]) -> list[str]:
    """Returns the code of a function, and of the functions of other packages than torch that it calls by their names, with the
    values that they use: global ones, defaults and variables of functions around them. Raises TypeError if they use something else
    by its name, such as a tensor or a module that is not torch's."""
    found: dict[str, None] = {}
    _add(function, found)
    return list(found)


def _add(function: Any, found: dict[str, None]) -> None:
    code = function.__code__
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    text = f"{function.__module__}.{function.__qualname__} {_text(code)} {function.__defaults__} {function.__kwdefaults__}"
    if text in found:
        return
    found[text] = None
    used = {name: function.__globals__[name] for name in sorted(_names(code)) if name in function.__globals__}
    for name, value in [*used.items(), *zip(code.co_freevars, cells, strict=True)]:
        if isinstance(value, (*_PLAIN, torch.dtype, torch.device)):
            found[f"{text} uses {name} = {value!r}"] = None
        elif isinstance(value, FunctionType) and not _is_torchs(value):
            _add(value, found)
        elif not isinstance(value, torch.Tensor) and _is_torchs(value):
            continue
        else:
            raise TypeError(f"{function.__qualname__} uses {name}, which is no function, number, text or part of torch")


_PLAIN = bool, int, float, str, bytes, tuple, type(None)


def _text(code: CodeType) -> str:
    constants = [_text(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names} {code.co_varnames} {code.co_freevars}"


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _names(one)


def _is_torchs(value: Any) -> bool:
    name = value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", ""))
    return name.split(".")[0] in ("torch", "math")
