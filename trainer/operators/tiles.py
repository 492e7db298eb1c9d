"""Causal attention in tiles: a kernel in C++ (tiles.cpp) for CPUs that multiply bfloat16 matrices.

It reads query, key and value where a layer's projections have left them, does not repeat keys that heads share, and keeps for the
backward pass its output and a statistic of each query's softmax.

Shapes: B micro-batch, A query heads, G key heads, S sequence, D head width.
"""

import ctypes
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bagualu.trainer.operators.compiled import CompileError, is_compiled, load_compiled
from bagualu.trainer.operators.usual import tiles_compute
from bagualu.trainer.user_settings import cpp_compiler

_SOURCE = Path(__file__).with_suffix(".cpp")
_OPTIONS = ("-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16")
_INSTRUCTIONS = ("fma3", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16")
"""The instruction sets of `_OPTIONS`, as torch names them."""
_COMPILER = "a C++ compiler that works (g++, or what the variable CXX names)"
log = logging.getLogger(__name__)


class AttentionTiles:
    """The kernel as a variant of attention: for the arguments of `causal_attention` in bfloat16, without slopes, mask or window."""

    def lacks(self) -> str | None:
        """Returns what the kernel needs and this machine has not; None if nothing."""
        capabilities = torch.cpu.get_capabilities()
        if not all(capabilities.get(name) for name in _INSTRUCTIONS):
            return "a CPU with AVX512-BF16 instructions"
        if cpp_compiler() is None and not is_compiled(_SOURCE, _OPTIONS):
            return _COMPILER
        return None

    def fails(self) -> str | None:
        """Compiles the kernel; returns what it needs if that fails."""
        return None if self._kernels is not None else _COMPILER

    def takes(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        slopes: torch.Tensor | None = None,
        window: int | None = None,
        mask: torch.Tensor | None = None,
    ) -> bool:
        """Returns whether the kernel computes these arguments. It is compiled by the first call that it could compute; if that
        fails, a line is logged, and it takes no arguments from then on."""
        if mask is not None or query.device.type != "cpu":
            return False
        in_bfloat16 = query.dtype == key.dtype == value.dtype == torch.bfloat16
        batch, heads, length, width = query.shape
        fits = key.shape == value.shape == (batch, key.shape[1], length, width) and heads % key.shape[1] == 0
        computes = fits and tiles_compute(in_bfloat16, width, length, window, slopes is not None)
        return computes and self._kernels is not None

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Returns the output [B, A, S, D], in memory as [B, S, A, D]; key and value [B, G, S, D]. The other arguments change
        nothing where `takes` is true."""
        mixed: torch.Tensor = _InTiles.apply(query, key, value)
        return mixed

    @cached_property
    def _kernels(self) -> ctypes.CDLL | None:
        try:
            return _load()
        except CompileError as error:
            log.warning("attention in tiles cannot be compiled (%s); torch's kernel takes its place", error)
            return None

    def run(self, kernel: str, *given: Any) -> None:
        """Calls a function of the library. Raises RuntimeError if it fails."""
        assert self._kernels is not None, "takes() has said that there is no such kernel"
        if (failed := getattr(self._kernels, kernel)(*given)) is not None:
            raise RuntimeError(f"attention in tiles: {failed.decode(errors='replace')}")


attention_tiles = AttentionTiles()


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (_contiguous_heads(t) for t in (query, key, value))
        output, statistics = _empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        attention_tiles.run("attention_forward", _shape(query, key), *map(_heads, (query, key, value, output)), _data(statistics))
        ctx.save_for_backward(query, key, value, output, statistics)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, output, statistics = ctx.saved_tensors
        found = [_empty_like(t) for t in (query, key, value)]
        given = (query, key, value, output, _contiguous_heads(grads[0]))
        attention_tiles.run("attention_backward", _shape(query, key), *map(_heads, given), _data(statistics), *map(_heads, found))
        return tuple(found)


def _load() -> ctypes.CDLL:
    """Raises CompileError if the kernel cannot be compiled, or does not work with torch as it is."""
    library = load_compiled(_SOURCE, _OPTIONS)
    library.attention_forward.restype = library.attention_backward.restype = ctypes.c_char_p
    library.attention_workspace.restype = ctypes.c_int64
    tried, statistic = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16), torch.empty(1)
    failed = library.attention_forward(_shape(tried, tried), *[_heads(tried)] * 4, _data(statistic))
    if failed is not None:
        raise CompileError(failed.decode(errors="replace").partition("\n")[0])
    return library


def workspace_bytes(query: torch.Tensor, key: torch.Tensor) -> int:
    """Returns the bytes in which a thread computes the backward pass of this query and key."""
    return int(_load().attention_workspace(_shape(query, key)))


def _contiguous_heads(x: torch.Tensor) -> torch.Tensor:
    """Returns x [B, heads, S, D], copied if elements of a head do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """Returns an empty [B, heads, S, D] that lies in memory as [B, S, heads, D], like the outputs of projections."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _shape(query: torch.Tensor, key: torch.Tensor) -> Any:
    """Returns a Shape of tiles.cpp."""
    batch, heads, length, width = query.shape
    return (ctypes.c_int64 * 5)(batch, heads, key.shape[1], length, width)


def _heads(x: torch.Tensor) -> Any:
    """Returns a Heads of tiles.cpp."""
    return (ctypes.c_int64 * 4)(x.data_ptr(), *x.stride()[:3])


def _data(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())
