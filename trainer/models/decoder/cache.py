"""Runs a decoder on the next tokens of sequences, given keys and values of attention for the tokens before them.

Shapes: B sequences, S columns of a pass, C columns of the cache, A query heads, G key heads, D head width.

The sequences of a batch end in the same column. Shorter ones begin later: `padding` columns before them hold tokens that no other
token sees. The modules are those that train; inside `cached`, attention keeps keys and values, and positions count from each
sequence's own beginning.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from bagualu.parallel.precision import multiply_dtype
from bagualu.trainer.models.decoder.layers import Attend, Attention, Positions
from bagualu.trainer.models.decoder.model import Head, LearnedPositions
from bagualu.trainer.operators.attention import attention_to_seen, kept_dtype, mask_of_seen

GROWTH = 64
"""Caches grow by this many columns at a time: processors that generate code for each shape of a product then see few shapes."""
_MASK_ELEMENTS = 2**24
"""The most elements of a mask: longer prompts are attended to in blocks of their tokens."""


class Columns:
    """Which columns of the cache are filled, and which of them the tokens of a pass fill and see; the same for all layers."""

    def __init__(self, padding: torch.Tensor) -> None:
        """padding [B]: the number of columns before the first token of each sequence."""
        self.padding = padding
        self.filled = 0
        """The number of columns filled by earlier passes."""
        self.added = 0
        """The number of columns that the current pass adds: the last of its S."""
        self.positions = padding.new_zeros(0)
        """The position of each token of the current pass in its sequence [B, S], 0 for padding."""
        self._own = padding.new_zeros(0)
        """The column of each token of the current pass [S]; negative for tokens that are not kept."""
        self._padded = bool(padding.any())
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}
        """The masks of all tokens of the current pass, if they are few, by what else they depend on."""
        self.angles: dict[Positions, tuple[torch.Tensor, torch.Tensor]] = {}
        """What the attentions of the current pass that have these positions rotate by."""

    @property
    def capacity(self) -> int:
        """The number of columns C that caches have in the current pass."""
        return -(-(self.filled + self.added) // GROWTH) * GROWTH

    @property
    def begins(self) -> bool:
        """Whether the current pass begins all sequences, in the same column, so that its tokens see each other as in training."""
        return not self.filled and not self._padded and len(self._own) == self.added

    @contextmanager
    def adding(self, added: int, width: int) -> Iterator[None]:
        """Makes the context of a pass over `width` columns of tokens, of which the last `added` continue the sequences. Those
        before them are not kept; their results mean nothing."""
        self.added = added
        self._masks.clear()
        self.angles.clear()
        end = self.filled + added
        self._own = torch.arange(end - width, end, device=self.padding.device)
        self.positions = (self._own - self.padding.unsqueeze(1)).clamp(min=0)
        yield
        self.filled = end

    def masks(
        self, shared: int, window: int | None, dtype: torch.dtype, slopes: torch.Tensor | None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields ranges of the tokens of the current pass, each with its mask for `attention_to_seen`, which has at most
        _MASK_ELEMENTS elements, unless the range is one token. Each of `shared` heads has a key; within a `window`, a token sees
        only the latest tokens, as many as this with itself."""
        count = len(self._own)
        heads = shared if slopes is None else len(slopes)
        rows = max(1, _MASK_ELEMENTS // (len(self.padding) * heads * self.capacity))
        for first in range(0, count, rows):
            part = slice(first, first + rows)
            mask = self._masks.get((shared, window)) if slopes is None and rows >= count else None
            if mask is None:
                seen, distances = self._seen(self._own[part])
                seen = seen if window is None else seen & (distances > -window)
                mask = self._masks[shared, window] = mask_of_seen(seen, distances, shared, dtype, slopes)
            yield part, mask

    def _seen(self, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        columns = torch.arange(self.capacity, device=own.device)
        distances = columns - own.unsqueeze(1)
        seen = ((distances <= 0) & (columns >= self.padding.view(-1, 1, 1))).unsqueeze(1)
        # Padding sees itself, and tokens before the first column see that: the softmax of nothing is not a number, and no weight
        # of 0 takes such a value out of a sum.
        seen |= distances == 0
        seen[..., 0] |= own < 0
        return seen, distances


class _LayerCache:
    """Takes the place of an attention's `attend`: adds the new keys and values to those before, and attends to all of them."""

    def __init__(self, columns: Columns, attend: Attend, window: int | None = None) -> None:
        """`attend`: the function whose place it takes. `window`: each token sees only the latest tokens, as many as this with
        itself; None: all."""
        self._columns, self._attend, self._window = columns, attend, window
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        """Keys and values [B, G, C, D]."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor | None = None
    ) -> torch.Tensor:
        columns, dtype = self._columns, multiply_dtype(query)
        keys, values = self._kept = self._room(key, dtype)
        new = slice(columns.filled, columns.filled + columns.added)
        keys[:, :, new], values[:, :, new] = key[:, :, -columns.added :], value[:, :, -columns.added :]
        if columns.begins and (self._window is None or self._window >= columns.added):
            return self._attend(query, key, value, slopes)
        masks = columns.masks(query.shape[1] // key.shape[1], self._window, dtype, slopes)
        parts = [attention_to_seen(query[:, :, rows].to(dtype), keys, values, mask) for rows, mask in masks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).to(query.dtype)

    def _room(self, like: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values with as many columns as the current pass needs; those not filled are zero."""
        capacity = self._columns.capacity
        if self._kept is not None and self._kept[0].shape[2] == capacity:
            return self._kept
        batch, heads, _, width = like.shape
        keys, values = (like.new_zeros((batch, heads, capacity, width), dtype=one) for one in (kept_dtype(like, dtype), dtype))
        for before, larger in zip(self._kept or (), (keys, values), strict=False):
            larger[:, :, : before.shape[2]] = before
        return keys, values


def _angles(columns: Columns, positions: Positions) -> Positions:
    """Returns the function that takes the place of `positions`, an attention's rotary positions, in a pass."""

    def angles(length: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if positions not in columns.angles:
            cos, sin = positions(columns.capacity, dtype, device)
            columns.angles[positions] = cos[columns.positions], sin[columns.positions]
        return columns.angles[positions]

    return angles


@contextmanager
def cached(model: nn.Module, padding: torch.Tensor, last: int = 1) -> Iterator[Columns]:
    """Inside this context, every pass of `model` within `adding` of the yielded object continues the sequences of a batch, and
    without labels the head returns the logits of their `last` tokens [B, last, V]. Afterwards the model is as before.

    padding [B] is on the model's device. Gradients must be off.
    """
    columns, undo = Columns(padding), list[Callable[[], None]]()

    def replace(module: nn.Module, name: str, value: object) -> None:
        undo.append(partial(setattr, module, name, getattr(module, name)))
        setattr(module, name, value)

    for module in model.modules():
        if isinstance(module, Attention):
            replace(module, "attend", _LayerCache(columns, module.attend, module.window))
            if module.positions is not None:
                replace(module, "positions", _angles(columns, module.positions))
        elif isinstance(module, LearnedPositions):
            replace(module, "given", lambda: columns.positions)
        elif isinstance(module, Head):
            replace(module, "columns", slice(-last, None))
    try:
        yield columns
    finally:
        for restore in undo:
            restore()
