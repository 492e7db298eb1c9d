"""Kernels that torch's compiler generates from plain functions: each reads its inputs and writes its results once, whatever the
number of operations between them.

    @kernel
    def product(gate, up):
        return silu(gate) * up

The forward and the backward pass of an operator are functions of their own, and matrix products stay outside. So weight gradients
still go straight to their buckets, and a schedule may take the backward pass in two parts.
"""

import logging
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch

from bagualu.parallel.precision import dispatch_mode

log = logging.getLogger(__name__)

_MOST_SHAPES = 64
"""How many kernels are generated of one function at most, for different dtypes, strides or constants. A size that changes costs one
more kernel, which takes all sizes."""


class Kernel:
    """Calls a function of tensors and numbers, without effects, by way of the kernel that is generated from it.

    Once the compiler has failed, and within a dispatch mode, which must see each operation, it calls the function itself. A mode
    with a method `as_one_kernel` gets the kernel and its arguments instead."""

    def __init__(self, function: Callable[..., Any], dynamic: bool | None = None) -> None:
        self.function, self.dynamic = function, dynamic
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__name__.removeprefix('_')}"
        self._failed = False

    def __call__(self, *given: Any) -> Any:
        if (mode := dispatch_mode()) is not None:
            as_one = getattr(mode, "as_one_kernel", None)
            return self.function(*given) if as_one is None else as_one(self, given)
        if self._failed:
            return self.function(*given)
        with torch.no_grad():
            try:
                return self._compiled(*given)
            except Exception as error:
                if not _of_compiler(error):
                    raise
                self._failed = True
                log.warning("torch's compiler fails for %s (%s); it is not compiled from now on", self.name, _first_line(error))
                return self.function(*given)

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        torch._dynamo.config.recompile_limit = _MOST_SHAPES  # torch loads the compiler here: two seconds
        torch._inductor.config.cpp.vec_isa_ok = True  # that the CPU has AVX-512 is else tried out in each process: a second
        return torch.compile(self.function, fullgraph=True, dynamic=self.dynamic)

    @property
    def is_generated(self) -> bool:
        """Whether calls have been computed by a generated kernel, all of them."""
        return "_compiled" in self.__dict__ and not self._failed


def kernel(function: Callable[..., Any]) -> Kernel:
    """Returns the kernel of a function that computes each element for itself; a decorator. A second size of its tensors has a
    kernel for all sizes generated, which gives the same bits."""
    return Kernel(function)


def kernel_with_sums(function: Callable[..., Any]) -> Kernel:
    """Does the same for a function that adds elements up. Each size has a kernel of its own, since the order of sums may depend on
    it; were a kernel for all sizes generated later, a run that resumes would have other bits."""
    return Kernel(function, dynamic=False)


@cache
def fails() -> str | None:
    """Returns what generated kernels need and this machine has not, found out by generating one; None if nothing."""
    probe = Kernel(_twice)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    probe(torch.ones(64, device=device))
    return None if probe.is_generated else "a compiler that works (g++, or what the variable CXX names)"


def _twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


def _first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _of_compiler(error: Exception) -> bool:
    """Returns whether an error comes from torch's compiler, rather than from the kernel that it has generated."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
