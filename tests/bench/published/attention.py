"""Attention as frameworks computed it before flash attention: two products of matrices, and the softmax of their scores between
them.

Shapes: B micro-batch, A query heads, S sequence, D head width. Megatron-LM's fused kernel
(fused_kernels/scaled_upper_triang_masked_softmax) scales, masks and normalises the scores [B A, S, S] in one pass over them. Then
dropout (attention_dropout, by default 0.1) writes them again with a mask. The products also compute the half that the mask leaves
out."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.models.decoder.layers import Attention

DROPOUT = 0.1


def unfused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the output [B, A, S, D] for tensors without values: the kernels are those of training, the mask is left out, because
    it costs nothing in the kernel that applies it."""
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    queries, keys, values = (tensor.flatten(0, 1) for tensor in (query, key, value))
    weights = torch.softmax(torch.bmm(queries, keys.mT), -1)
    kept, _ = torch.native_dropout(weights, DROPOUT, True)
    return torch.bmm(kept, values).view(query.shape)


def unfused_again(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the same, but keeps only the arguments for the backward pass, which computes the scores again."""
    mixed: torch.Tensor = checkpoint(unfused, query, key, value, use_reentrant=False, preserve_rng_state=False)
    return mixed


ATTENTIONS: dict[str, Callable[..., torch.Tensor] | None] = {"fused": None, "unfused": unfused, "unfused_again": unfused_again}
"""None: the kernel that the trainer chooses."""


def assemble_with(attention: str) -> Callable[..., TrainerState]:
    """Returns `assemble` for a model whose layers compute attention in this way."""
    attend = ATTENTIONS[attention]
    return assemble if attend is None else partial(_assemble, attend)


def _assemble(attend: Callable[..., torch.Tensor], *args: Any, **named: Any) -> TrainerState:
    state = assemble(*args, **named)
    for module in state.engine.model.modules():
        if isinstance(module, Attention):
            module.attend = attend
    return state
