"""The variant of attention that is taken where nothing has been measured, and what a variant computes. Does not import torch, since
predictions of memory follow the same rules."""

_LONGEST = 2**9
"""The longest sequence, in tokens, for which blocks are taken; for longer ones torch's kernel is as fast (docs/performance.md)."""
TILE_WIDTH = 16
"""The number of elements by which attention in tiles divides heads (tiles.cpp)."""


def usual_variant(chip: str, in_bfloat16: bool, length: int, window: int | None) -> str:
    """Returns "blocks" or "kernel" for causal attention to sequences of `length` tokens, or to the latest `window` of them, on
    `chip`. `in_bfloat16`: whether query and key are multiplied in bfloat16."""
    in_window = window is not None and window < length
    return "blocks" if chip == "cpu" and (in_window or (in_bfloat16 and length <= _LONGEST)) else "kernel"


def tiles_compute(in_bfloat16: bool, width: int, length: int, window: int | None, slopes: bool) -> bool:
    """Returns whether "tiles" computes attention to `length` tokens, or to the latest `window` of them, with heads of `width`
    elements; else the variant "kernel" takes its place. `slopes`: whether scores depend on distances (ALiBi)."""
    return in_bfloat16 and width % TILE_WIDTH == 0 and not slopes and (window is None or window >= length)
