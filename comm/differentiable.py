"""Collectives that gradients pass through: the backward pass of each is the transposed collective.

    function       forward, on every rank                 backward
    copy_to        x, unchanged                           sums the gradients of all ranks
    reduce_from    the sum of x over the ranks            passes the gradient on
    gather_from    the x of all ranks, concatenated       sums the gradients; each rank keeps its own slice
    scatter_to     its own slice of the sum of x          concatenates the gradients of all ranks
    all_to_all     rows of x move to other ranks          moves the gradients' rows back

A gradient here is that of the loss with respect to the function's result; the backward pass turns it into that with respect to x.
copy_to and reduce_from enclose a tensor-parallel block (Megatron-LM's f and g, arXiv 1909.08053, section 3); gather_from and
scatter_to replace them under sequence parallelism (arXiv 2205.05198, section 4.2).
"""

from typing import Any

import torch

from bagualu.comm.group import Group


def copy_to(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Returns x [any shape], which is the same on every rank. Ranks may use the result differently: the backward pass sums the
    ranks' gradients."""
    return x if group.size == 1 else _Copy.apply(x, group)


def reduce_from(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Returns the sum of x over the group's ranks, in the shape of x, on every rank. The gradient of the result must be the same on
    all of them."""
    return x if group.size == 1 else _Reduce.apply(x, group)


def gather_from(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Returns the x of all ranks, concatenated along `dim` in the group's order, on every rank."""
    return x if group.size == 1 else _Gather.apply(x, group, dim)


def scatter_to(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Returns this rank's slice along `dim` of the sum of x over the group's ranks. The group's size must divide x.shape[dim]."""
    return x if group.size == 1 else _Scatter.apply(x, group, dim)


def all_to_all(x: torch.Tensor, group: Group, output_splits: list[int], input_splits: list[int]) -> torch.Tensor:
    """Sends input_splits[i] rows of x [sum(input_splits), ...] to position i and returns the rows received, [sum(output_splits),
    ...], of which output_splits[i] come from position i."""
    return x if group.size == 1 else _AllToAll.apply(x, group, output_splits, input_splits)


def _sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    group.all_reduce(total)
    return total


def _join(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    parts = x.new_empty((group.size, *x.shape))
    group.all_gather(parts, x.contiguous())
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _slice_of_sum(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    parts = x.unflatten(dim, (group.size, -1)).movedim(dim, 0).contiguous()
    mine = torch.empty_like(parts[0])
    group.reduce_scatter(mine, parts)
    return mine


def _exchange(x: torch.Tensor, group: Group, output_splits: list[int], input_splits: list[int]) -> torch.Tensor:
    output = x.new_empty((sum(output_splits), *x.shape[1:]))
    group.all_to_all(output, x.contiguous(), output_splits, input_splits)
    return output


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _sum(grads[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _join(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _slice_of_sum(grads[0], ctx.group, ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _slice_of_sum(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _join(grads[0], ctx.group, ctx.dim), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, output_splits: list[int], input_splits: list[int]) -> torch.Tensor:
        ctx.group, ctx.splits = group, (output_splits, input_splits)
        return _exchange(x, group, output_splits, input_splits)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        output_splits, input_splits = ctx.splits
        return _exchange(grads[0], ctx.group, input_splits, output_splits), None, None, None
