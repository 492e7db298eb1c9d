"""Causal attention: torch's fused kernel or, on a CPU that multiplies bfloat16 matrices, plain matrix products in blocks.

Shapes: B micro-batch, A query heads, S sequence, D head width; H = B * A, all heads.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from bagualu.parallel.precision import HALF, accurate_dtype, chip_of, multiply_dtype, on_nvidia
from bagualu.trainer.operators import fused
from bagualu.trainer.operators.alibi import distances, extended
from bagualu.trainer.operators.usual import usual_variant

_FEW_ROWS = 16
"""The most queries for each key that `attention_to_seen` multiplies on a CPU without torch's kernel."""
_BLOCK_ROWS = 64
_BLOCK_ELEMENTS = 2**20
"""The number of attention weights computed in one block: few enough for the caches, many enough for several threads."""


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor | None = None,
    window: int | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns attention's output [B, A, S, D] for query [B, A, S, D], key and value [B, A / g, S, D], each shared by g query
    heads. With `slopes` [A], each score is changed by the slope of its head times the position of the key minus that of the query
    (ALiBi). With a `window`, each token attends to its latest `window` tokens only, its own included. With a `mask` [B, 1, S, S],
    which is added to the scores, that decides which keys each token attends to, within its window.

    Computes it in blocks where `usual_variant` says so, else by torch's kernel."""
    if attention_blocks.takes(query, key, value, slopes, window, mask):
        in_bfloat16 = multiply_dtype(query) == torch.bfloat16
        if usual_variant(chip_of(query.device), in_bfloat16, query.shape[2], window) == "blocks":
            return attention_blocks(query, key, value, slopes, window, mask)
    return attention_kernel(query, key, value, slopes, window, mask)


def attention_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor | None = None,
    window: int | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the output of torch's kernel for the arguments of `causal_attention`. The kernel knows no window: it computes what a
    mask then removes."""
    dtype, length = multiply_dtype(query), query.shape[2]
    window = None if window is None or window >= length else window
    if mask is not None and window is not None:
        mask, window = mask.masked_fill(~_in_window(length, length, window, mask.device), -torch.inf), None
    if dtype in HALF and on_nvidia(query) and window is None and mask is None:  # reads shared heads without expanding them
        return _by_kernel(query, key, value, slopes)
    return _by_kernel(*_expanded(query, key, value, dtype), slopes, window, mask).to(query.dtype)


class _Blocks:
    """`attention_in_blocks` as a variant: for the arguments of `causal_attention` without a mask, on a CPU."""

    def takes(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        slopes: torch.Tensor | None = None,
        window: int | None = None,
        mask: torch.Tensor | None = None,
    ) -> bool:
        return mask is None and chip_of(query.device) == "cpu"

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        slopes: torch.Tensor | None = None,
        window: int | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        dtype = multiply_dtype(query)
        if dtype == torch.float16:
            dtype = torch.float32  # products of gradients would leave the range of float16
        window = None if window is None or window >= query.shape[2] else window
        return attention_in_blocks(*_expanded(query, key, value, dtype), slopes, window).to(query.dtype)


attention_blocks = _Blocks()


def _expanded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns query, key and value [B, A, S, D] in `dtype`, each query head with a key and a value of its own."""
    shared = query.shape[1] // key.shape[1]
    key, value = (t.to(dtype).repeat_interleave(shared, dim=1) if shared > 1 else t.to(dtype) for t in (key, value))
    return query.to(dtype), key, value


def mask_of_seen(
    seen: torch.Tensor, distances: torch.Tensor, shared: int, dtype: torch.dtype, slopes: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns what `attention_to_seen` adds to scores, in at least float32, so that each query sees only the keys for which `seen`
    [B, 1, S, C] is true, at least one of them. `shared`: the number of query heads for each key. `slopes` [A] as in
    `causal_attention`; `distances` [S, C] is the position of each key minus that of each query."""
    batch, _, length, keys = seen.shape
    if slopes is None:
        mask = seen.new_zeros(seen.shape, dtype=accurate_dtype(dtype)).masked_fill_(~seen, -torch.inf)
        return mask.unsqueeze(2).expand(-1, 1, shared, -1, -1).reshape(batch, 1, shared * length, keys)
    biases = slopes.view(-1, 1, 1) * distances.to(slopes.dtype)
    return torch.where(seen, biases, -torch.inf).to(accurate_dtype(dtype)).view(batch, -1, shared * length, keys)


def kept_dtype(key: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which a cache best keeps keys that are multiplied in `dtype`: on a CPU that of scores, since each token
    would have to widen all of them."""
    return accurate_dtype(dtype) if chip_of(key.device) == "cpu" else dtype


def attention_to_seen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns attention's output [B, A, S, D] for query [B, A, S, D], key and value [B, G, C, D], each shared by A / G query heads.
    Keys may have the dtype of `kept_dtype`. `mask`: of `mask_of_seen`."""
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    rows = heads // groups * length  # heads that share a key are more rows for it, so that keys need not be repeated
    by_key = query.reshape(batch, groups, rows, width)
    if rows <= _FEW_ROWS and chip_of(query.device) == "cpu":
        mixed = _of_few_rows(by_key, key, value, mask)
    else:
        mixed = F.scaled_dot_product_attention(by_key, key.to(query.dtype), value, attn_mask=mask.to(query.dtype))
    return mixed.reshape(batch, heads, length, width)


def _of_few_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns what torch's kernel does, in two products for all heads together. The kernel of a CPU computes them one after the
    other, in bfloat16 several times as slowly. Scores are in at least float32."""
    batch, groups, rows, width = query.shape
    wide = accurate_dtype(query.dtype)
    scores = torch.bmm(query.flatten(0, 1).to(wide) * (1 / math.sqrt(width)), key.flatten(0, 1).to(wide).mT)
    weights = scores.view(batch, groups, rows, -1).add_(mask).softmax(-1).to(value.dtype)
    return torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).view(batch, groups, rows, width)


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor | None,
    window: int | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    width, scale = query.shape[-1], None
    if slopes is not None:
        scale = 1 / math.sqrt(width)
        query, key, value = extended(query, key, value, slopes)
    if query.is_meta:
        output = fused.attention(query, key, value, scale)
    elif window is not None or mask is not None:
        seen = _in_window(query.shape[2], key.shape[2], window, query.device) if window is not None else None
        mask = seen if mask is None else mask.to(query.dtype)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    else:
        grouped = query.shape[1] > key.shape[1]
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return output if slopes is None else output[..., :width]


def _in_window(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """Returns which keys [queries, keys] each query attends to, where the queries are the last of `keys` tokens."""
    distance = torch.arange(keys - queries, keys, device=device).unsqueeze(1) - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)


def attention_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor | None = None, window: int | None = None
) -> torch.Tensor:
    """Returns the output [B, A, S, D] of causal attention for query, key and value [B, A, S, D]; `slopes` [A] and `window` as in
    `causal_attention`.

    Each block is a range of rows of many heads, multiplied with the keys that these rows may see. torch's kernel takes one head
    after the other, in products too small to use the processor fully (docs/performance.md). Scores and their softmax are in at
    least float32, and are computed again in the backward pass.
    """
    mixed: torch.Tensor = _InBlocks.apply(query, key, value, slopes, window)
    return mixed


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        slopes: torch.Tensor | None,
        window: int | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, slopes)
        ctx.window = window
        queries, keys, values = _scaled(query), _wide(key), _heads(value)
        mixed = torch.empty_like(values)
        for heads, rows, seen in _blocks(values, window):
            weights = _weights(queries[heads, rows], keys[heads, seen], _of_heads(slopes, heads), window).to(values.dtype)
            mixed[heads, rows] = torch.bmm(weights, values[heads, seen])
        return mixed.view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, slopes = ctx.saved_tensors
        wide_queries, wide_keys = _scaled(query), _wide(key)
        queries, keys, values, grad = _heads(query), _heads(key), _heads(value), _heads(grads[0])
        grad_queries = torch.empty_like(wide_queries)
        grad_keys, grad_values = torch.zeros_like(wide_keys), torch.zeros_like(wide_keys)
        for heads, rows, seen in _blocks(values, ctx.window):
            weights = _weights(wide_queries[heads, rows], wide_keys[heads, seen], _of_heads(slopes, heads), ctx.window)
            grad_weights = torch.bmm(grad[heads, rows], values[heads, seen].mT).to(weights.dtype)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).to(values.dtype)
            grad_queries[heads, rows] = torch.bmm(grad_scores, keys[heads, seen])
            grad_keys[heads, seen].add_(torch.bmm(grad_scores.mT, queries[heads, rows]))
            grad_values[heads, seen].add_(torch.bmm(weights.to(values.dtype).mT, grad[heads, rows]))
        grad_queries /= math.sqrt(query.shape[-1])
        grad_keys /= math.sqrt(query.shape[-1])
        return *(t.to(values.dtype).view(grads[0].shape) for t in (grad_queries, grad_keys, grad_values)), None, None


def _heads(x: torch.Tensor) -> torch.Tensor:
    """Reshapes [B, A, S, D] to [H, S, D], contiguous."""
    return x.flatten(0, 1).contiguous()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return _heads(x).to(accurate_dtype(x.dtype))


def _scaled(query: torch.Tensor) -> torch.Tensor:
    return _wide(query) / math.sqrt(query.shape[-1])


def _blocks(heads: torch.Tensor, window: int | None) -> Iterator[tuple[slice, slice, slice]]:
    """Yields the slices (heads, rows, keys that the rows may see) of every block of a tensor [H, S, D]."""
    count, length, _ = heads.shape
    before = length if window is None else window - 1
    at_once = max(1, _BLOCK_ELEMENTS // (min(length, _BLOCK_ROWS) * min(length, _BLOCK_ROWS + before)))
    for head in range(0, count, at_once):
        for row in range(0, length, _BLOCK_ROWS):
            rows = slice(row, min(length, row + _BLOCK_ROWS))
            yield slice(head, min(count, head + at_once)), rows, slice(max(0, row - before), rows.stop)


def _of_heads(slopes: torch.Tensor | None, heads: slice) -> torch.Tensor | None:
    """Returns the slopes [h] of `heads`, a range of all heads of all sequences, given those of a sequence's heads [A]."""
    return None if slopes is None else slopes[torch.arange(heads.start, heads.stop, device=slopes.device) % slopes.shape[0]]


def _weights(queries: torch.Tensor, keys: torch.Tensor, slopes: torch.Tensor | None, window: int | None = None) -> torch.Tensor:
    """Returns the softmax [h, r, s] of queries [h, r, D] with keys [h, s, D]. The queries are the last r of s tokens, and each sees
    only keys up to its own token, at most `window`. `slopes`: [h]."""
    scores = torch.bmm(queries, keys.mT)
    rows = queries.shape[1]
    if slopes is not None:
        scores.addcmul_(slopes.view(-1, 1, 1), distances(rows, keys.shape[1], scores))
    scores[..., -rows:].add_(scores.new_full((rows, rows), -torch.inf).triu_(1))
    if window is not None and (older := scores.shape[-1] - window) > 0:  # keys that the last query does not see
        scores[..., :older].add_(scores.new_full((rows, older), -torch.inf).tril_(older - rows))
    return torch.softmax(scores, -1)
