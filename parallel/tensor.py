"""Tensor and sequence parallel: what happens to activations at the borders of a block whose matrices are split.

Shapes: B micro-batch, S sequence, H hidden; t the tensor axis.

                          without sequence parallel          with it
    between blocks        x [B, S, H] on every rank of t     its slice [B, S/t, H]
    into a block          copy_to                            gather_from along S
    out of a block        reduce_from (sum over t)           scatter_to along S

Inside a block the first matrices are split by rows of their output (column parallel), the last one by its input (row
parallel), so a block needs one collective each way. The module itself is unchanged: it works on the slices it was given.
"""

from typing import Any

import torch
from torch import nn

from bagualu.comm.differentiable import copy_to, gather_from, reduce_from, scatter_to
from bagualu.comm.group import Group

_SEQUENCE_DIM = 1


def enter(x: torch.Tensor, group: Group, sequence: bool) -> torch.Tensor:
    """Into a block: the whole sequence on every rank, gradients summed over the group on the way back."""
    return gather_from(x, group, _SEQUENCE_DIM) if sequence else copy_to(x, group)


def leave(x: torch.Tensor, group: Group, sequence: bool) -> torch.Tensor:
    """Out of a block: the sum of the ranks' parts, whole or this rank's slice of the sequence."""
    return scatter_to(x, group, _SEQUENCE_DIM) if sequence else reduce_from(x, group)


def wrap_block(module: nn.Module, group: Group, sequence: bool, leaves: bool = True) -> None:
    """Put enter and, where the output is a partial sum, leave around `module`. Its first input and first output are the x."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (enter(args[0], group, sequence), *args[1:])

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (leave(output[0], group, sequence), *output[1:])
        return leave(output, group, sequence)

    module.register_forward_pre_hook(before)
    if leaves:
        module.register_forward_hook(after)
