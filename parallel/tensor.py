"""Tensor and sequence parallelism: the collectives at the boundaries of a block whose matrices are split.

Shapes: B micro-batch, S sequence, H hidden; t the tensor axis.

                          without sequence parallelism       with sequence parallelism
    between blocks        x [B, S, H] on every rank of t     a slice [B, S/t, H] on each rank
    into a block          copy_to                            gather_from along S
    out of a block        reduce_from (sum over t)           scatter_to along S

In a block, the first matrices are split along their output (column parallel) and the last one along its input (row parallel), so
a block needs a single collective in each direction. The module's code is unchanged; it computes with the slices it holds.
"""

from typing import Any

import torch
from torch import nn

from bagualu.comm.differentiable import copy_to, gather_from, reduce_from, scatter_to
from bagualu.comm.group import Group

_SEQUENCE_DIM = 1


def enter(x: torch.Tensor, group: Group, sequence: bool) -> torch.Tensor:
    """Returns the input of a block, x for the whole sequence [B, S, H]. The backward pass sums the gradients with respect to that
    input over the group."""
    return gather_from(x, group, _SEQUENCE_DIM) if sequence else copy_to(x, group)


def leave(x: torch.Tensor, group: Group, sequence: bool) -> torch.Tensor:
    """Returns the output of a block, the sum of the ranks' partial x [B, S, H]; with `sequence`, this rank's slice [B, S/t, H]."""
    return scatter_to(x, group, _SEQUENCE_DIM) if sequence else reduce_from(x, group)


def wrap_block(module: nn.Module, group: Group, sequence: bool, leaves: bool = True) -> None:
    """Applies `enter` to the first input of `module` and, if `leaves` (the module's output is a partial sum), `leave` to its first
    output."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (enter(args[0], group, sequence), *args[1:])

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (leave(output[0], group, sequence), *output[1:])
        return leave(output, group, sequence)

    module.register_forward_pre_hook(before)
    if leaves:
        module.register_forward_hook(after)
