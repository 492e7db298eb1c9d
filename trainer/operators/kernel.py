"""Kernels that torch's compiler generates from plain functions: each reads its inputs and writes its results once, whatever the
number of operations between them.

    @kernel
    def product(gate, up):
        return silu(gate) * up

The forward and the backward pass of an operator are functions of their own, and matrix products stay outside. So weight gradients
still go straight to their buckets, and a schedule may take the backward pass in two parts.
"""

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

from bagualu.comm.errors import RecipeError
from bagualu.parallel.precision import dispatch_mode
from bagualu.trainer.operators import kept_code
from bagualu.trainer.operators.form import Form, form_of
from bagualu.trainer.operators.identity import identity_of

log = logging.getLogger(__name__)

_MOST_FORMS = 64
"""How many kernels are generated of one function at most, for different dtypes, sizes, strides or constants."""
_MOST_SHAPES = 4096
"""For how many shapes it is known at a time which kernel takes them."""
_COMPILING = threading.RLock()
"""Held while the compiler is at work, which is not made for several threads."""

_PLAIN = torch.Tensor, torch.nn.Parameter
_LEFT_TO_FUNCTIONS: ContextVar[bool] = ContextVar("kernels are left to their functions", default=False)

Call = Callable[[Sequence[Any]], Any]


class Kernel:
    """Calls a function of tensors and numbers by way of the kernel that is generated from it. The function may end by copying new
    values to some of its arguments, which it then returns; it has no other effects.

    Once the compiler has failed, it calls the function itself for shapes that have no kernel yet; with `or_fail`, it raises
    RecipeError instead. In a dispatch mode, which must
    see each operation, it always does; a mode with a method `as_one_kernel` gets the kernel and its arguments instead. Tensors of
    other classes than torch's own, such as DTensor, are left to the function too.
    """

    def __init__(self, function: Callable[..., Any], all_sizes: bool = False, or_fail: bool = False) -> None:
        self.function, self.all_sizes, self._or_fail = function, all_sizes, or_fail
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__name__.removeprefix('_')}"
        self._failed = False
        self._calls: dict[Hashable, Call] = {}
        """By dtypes, devices, shapes and strides of tensors, numbers, and settings of torch: what the generated code depends on."""
        self._forms: dict[Hashable, Call] = {}
        """The same for tensors of all sizes that one kernel takes."""

    def __call__(self, *given: Any) -> Any:
        if (mode := dispatch_mode()) is not None:
            as_one = getattr(mode, "as_one_kernel", None)
            return self.function(*given) if as_one is None else as_one(self, given)
        if _LEFT_TO_FUNCTIONS.get() or not _is_plain(given):
            return self.function(*given)
        call = self._calls.get(key := _key(given)) or self._generated(key, given)
        if not torch.is_grad_enabled():  # as within an autograd function
            return call(given)
        with torch.no_grad():
            return call(given)

    @property
    def is_generated(self) -> bool:
        """Whether generated kernels have been called, and none was missing."""
        return bool(self._calls) and not self._failed

    def _generated(self, key: Hashable, given: Sequence[Any]) -> Call:
        """Returns what calls the kernel for these arguments, which is generated unless there is one; the function if that fails."""
        form = form_of(given, self.all_sizes)
        with _COMPILING:
            call = self._forms.get(settings_and_form := (_settings(), form))
            if call is None and self._failed:
                call = self._plain
            elif call is None:
                call = self._forms[settings_and_form] = self._generate(given, form)
            if len(self._calls) >= _MOST_SHAPES:
                self._calls.clear()
            self._calls[key] = call
            return call

    def _generate(self, given: Sequence[Any], form: Form) -> Call:
        try:
            if len(self._forms) >= _MOST_FORMS:
                raise RuntimeError(f"{_MOST_FORMS} different shapes, strides or constants")
            depends_on = identity_of(self.function), form, _settings()
            code = kept_code.load_or_make(depends_on, lambda: _compile(self.function, given, form))
        except Exception as error:
            if self._or_fail:
                operator = self.name.partition(".")[0]
                raise RecipeError(f"torch's compiler fails for operators.{operator}=generated ({_first_line(error)}); mend it, or "
                                  f"resume with another variant of {operator}") from error  # fmt: skip
            self.function(*(_copied(value) for value in given))  # raises, if the mistake is in the function or in its arguments
            what = "other shapes of it are" if self._forms else "it is"  # those that have kernels keep them, and so their bits
            self._failed = True
            log.warning("torch's compiler fails for %s (%s); %s not compiled from now on", self.name, _first_line(error), what)
            return self._plain
        return code.on_arguments

    def _plain(self, given: Sequence[Any]) -> Any:
        return self.function(*given)


def kernel(function: Callable[..., Any]) -> Kernel:
    """Returns the kernel of a function that computes each element for itself; a decorator. One kernel is generated for all sizes of
    the leading dimensions of its tensors, those that are 1 apart."""
    return Kernel(function, all_sizes=True)


def kernel_with_sums(function: Callable[..., Any]) -> Kernel:
    """Does the same for a function that adds elements up. Each size has a kernel of its own, since the order of sums may depend on
    it; were a kernel for all sizes generated later, a run that resumes would have other bits."""
    return Kernel(function)


def kernel_in_place(function: Callable[..., Any]) -> Kernel:
    """Does the same as `kernel` for a function that changes a run's state. Other ranks may hold the same state, so one whose
    compiler fails must not go on with the function, which may round otherwise: calls raise RecipeError."""
    return Kernel(function, all_sizes=True, or_fail=True)


@contextmanager
def left_to_functions() -> Iterator[None]:
    """Within this context, the functions of kernels compute in the thread, and no kernel is generated."""
    token = _LEFT_TO_FUNCTIONS.set(True)
    try:
        yield
    finally:
        _LEFT_TO_FUNCTIONS.reset(token)


@cache
def fails(chip: str) -> str | None:
    """Returns what generated kernels need on `chip` and this machine has not, found out by generating one; None if nothing."""
    probe = Kernel(_twice)
    probe(torch.ones(64, device=chip))
    return None if probe.is_generated else "a compiler that works (g++, or what the variable CXX names)"


def _twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


def _compile(function: Callable[..., Any], given: Sequence[Any], form: Form) -> Any:
    from bagualu.trainer.operators import inductor

    return inductor.compile_function(function, form, form.sizes_in(given))


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _is_plain(given: Sequence[Any]) -> bool:
    return all(type(value) in _PLAIN or not isinstance(value, torch.Tensor) for value in given)


def _key(given: Sequence[Any]) -> Hashable:
    return (*_settings(), *(
        (value.dtype, value.device, value.shape, value.stride()) if isinstance(value, torch.Tensor) else (type(value), repr(value))
        for value in given
    ))  # fmt: skip


def _settings() -> tuple[int, bool]:
    """Returns the settings of torch on which generated code depends."""
    return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()


def _first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
