"""Kernels in C++ for CPUs with certain instructions, as variants of operators."""

import ctypes
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bagualu.trainer.operators.compiled import CompileError, is_compiled, load_compiled
from bagualu.trainer.user_settings import cpp_compiler

_COMPILER = "a C++ compiler that works (g++, or what the variable CXX names)"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Instructions:
    """Instructions that a CPU may have. `options` make the compiler use them; `capabilities` are torch's names of them."""

    name: str
    options: tuple[str, ...]
    capabilities: tuple[str, ...]


AVX512_BF16 = Instructions(
    "AVX512-BF16",
    ("-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
    ("fma3", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16"),
)
AVX2 = Instructions("AVX2", ("-mfma", "-mavx2"), ("fma3", "avx2"))


class CppKernels(ABC):
    """The functions of a C++ file, which is compiled when they are first needed. Each returns null, or a message if it fails."""

    source: Path
    name: str
    """What the functions compute, for messages."""
    instructions: Instructions

    @abstractmethod
    def try_out(self, library: ctypes.CDLL) -> str | None:
        """Calls a function of the library, which has just been loaded, and returns its message if it does not work with torch as
        it is."""

    def lacks(self) -> str | None:
        """Returns what the kernels need and this machine has not; None if nothing."""
        here = torch.cpu.get_capabilities()
        if not all(here.get(name) for name in self.instructions.capabilities):
            return f"a CPU with {self.instructions.name} instructions"
        if cpp_compiler() is None and not is_compiled(self.source, self.instructions.options):
            return _COMPILER
        return None

    def fails(self, chip: str) -> str | None:
        """Compiles the kernels, which are for CPUs only; returns what they need if that fails."""
        return None if self.library is not None else _COMPILER

    @cached_property
    def library(self) -> ctypes.CDLL | None:
        """The compiled functions; None, and a line is logged, if they cannot be had."""
        try:
            library = load_compiled(self.source, self.instructions.options)
            if (failed := self.try_out(library)) is not None:
                raise CompileError(failed.partition("\n")[0])
        except CompileError as error:
            log.warning("%s cannot be compiled (%s); torch's kernel takes its place", self.name, error)
            return None
        return library

    def run(self, kernel: str, *given: Any) -> None:
        """Calls a function of the library. Raises RuntimeError if it fails."""
        assert self.library is not None, "there is no such kernel"
        if (failed := message_of(getattr(self.library, kernel), *given)) is not None:
            raise RuntimeError(f"{self.name}: {failed}")


def message_of(function: Any, *given: Any) -> str | None:
    """Calls a function of a library and returns its message, if it fails."""
    function.restype = ctypes.c_char_p
    failed: bytes | None = function(*given)
    return None if failed is None else failed.decode(errors="replace")


def address(x: torch.Tensor) -> ctypes.c_void_p:
    """Returns the address of a tensor's first element, as an argument of a function of a library."""
    return ctypes.c_void_p(x.data_ptr())


def sizes_of(*sizes: int) -> list[ctypes.c_int64]:
    """Returns sizes as arguments of a function of a library."""
    return [ctypes.c_int64(size) for size in sizes]


def with_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns x [N, width], copied if elements of a row do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def have_sizes(sizes: tuple[int, ...], **matrices: torch.Tensor | None) -> bool:
    """Returns whether the matrices of a linear layer that are given are rows [N, I], columns [N, O] and weight [O, I], of the
    sizes (N, O, I)."""
    tokens, outputs, inputs = sizes
    shapes = {"rows": (tokens, inputs), "columns": (tokens, outputs), "weight": (outputs, inputs)}
    return all(x is None or x.shape == shapes[name] for name, x in matrices.items())
