"""The variant of attention that is taken where nothing has been measured. Does not import torch, since predictions of memory follow
the same rule."""

_LONGEST = 2**9
"""The longest sequence, in tokens, for which blocks are taken; for longer ones torch's kernel is as fast (docs/performance.md)."""


def usual_variant(chip: str, in_bfloat16: bool, length: int, window: int | None) -> str:
    """Returns "blocks" or "kernel" for causal attention to sequences of `length` tokens, or to the latest `window` of them, on
    `chip`. `in_bfloat16`: whether query and key are multiplied in bfloat16."""
    in_window = window is not None and window < length
    return "blocks" if chip == "cpu" and (in_window or (in_bfloat16 and length <= _LONGEST)) else "kernel"
