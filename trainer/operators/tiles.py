"""Causal attention in tiles: a kernel in C++ (tiles.cpp) for CPUs that multiply bfloat16 matrices.

It reads query, key and value where a layer's projections have left them, does not repeat keys that heads share, and keeps for the
backward pass its output and a statistic of each query's softmax.

Shapes: B micro-batch, A query heads, G key heads, S sequence, D head width.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch

from bagualu.trainer.operators.cpp_kernels import AVX512_BF16, CppKernels, address, message_of
from bagualu.trainer.operators.usual import tiles_compute


class AttentionTiles(CppKernels):
    """The kernel as a variant of attention: for the arguments of `causal_attention` in bfloat16, without slopes, mask or window."""

    source = Path(__file__).with_suffix(".cpp")
    name = "attention in tiles"
    instructions = AVX512_BF16

    def try_out(self, library: ctypes.CDLL) -> str | None:
        library.attention_workspace.restype = ctypes.c_int64
        tried, statistic = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16), torch.empty(1)
        return message_of(library.attention_forward, _shape(tried, tried), *[_heads(tried)] * 4, address(statistic))

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
        return computes and self.library is not None

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Returns the output [B, A, S, D], in memory as [B, S, A, D]; key and value [B, G, S, D]. The other arguments change
        nothing where `takes` is true."""
        mixed: torch.Tensor = _InTiles.apply(query, key, value)
        return mixed


attention_tiles = AttentionTiles()


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (_contiguous_heads(t) for t in (query, key, value))
        output, statistics = _empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        attention_tiles.run("attention_forward", _shape(query, key), *map(_heads, (query, key, value, output)), address(statistics))
        ctx.save_for_backward(query, key, value, output, statistics)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, output, statistics = ctx.saved_tensors
        found = [_empty_like(t) for t in (query, key, value)]
        given = (query, key, value, output, _contiguous_heads(grads[0]))
        attention_tiles.run("attention_backward", _shape(query, key), *map(_heads, given), address(statistics), *map(_heads, found))
        return tuple(found)


def workspace_bytes(query: torch.Tensor, key: torch.Tensor) -> int:
    """Returns the bytes in which a thread computes the backward pass of this query and key."""
    assert attention_tiles.library is not None, "there is no such kernel"
    return int(attention_tiles.library.attention_workspace(_shape(query, key)))


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
