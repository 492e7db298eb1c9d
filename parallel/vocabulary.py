"""Embedding and loss for a vocabulary whose rows are split over the tensor axis.

Shapes: B micro-batch, S sequence, N tokens, V vocabulary rows of this rank, H hidden.

The loss and the projection to the vocabulary are a single function. It works through the tokens in chunks and computes the gradient
of a chunk's logits right after the logits, so a [N, V] tensor never exists. The softmax statistics of a chunk take two small
all-reduces over the ranks (Megatron-LM, arXiv 1909.08053, section 3, for the split softmax).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bagualu.comm.differentiable import reduce_from, scatter_to
from bagualu.comm.group import Group
from bagualu.parallel.config import HEAD_CHUNK_TOKENS
from bagualu.parallel.data.reducer import gradient_sink
from bagualu.parallel.precision import accurate_dtype, multiply_dtype
from bagualu.parallel.products import Products, torch_products

ChunkLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Group | None], tuple[torch.Tensor, torch.Tensor]]
"""Has the arguments and results of `loss_and_gradient`."""
IGNORED = -100
"""The label of a token that adds nothing to the loss."""


def embedding(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the rows of weight [V, H] for tokens [B, S], as [B, S, H].

    The gradient of a frequent token is a sum of thousands of rows, so it is accumulated in at least float32; torch's own
    implementation accumulates in 16 bits, where the sum stops growing.
    """
    if not torch.is_grad_enabled():
        return F.embedding(tokens, weight)
    rows: torch.Tensor = _Embedding.apply(tokens, weight)
    return rows


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.dtype, ctx.sink = weight.shape, accurate_dtype(weight.dtype), gradient_sink(weight)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (tokens,) = ctx.saved_tensors
        rows = grads[0].flatten(0, -2)
        if ctx.sink is not None:
            ctx.sink.add_rows(rows, tokens.flatten())
            return None, None
        rows = rows.to(ctx.dtype)
        return None, rows.new_zeros(ctx.shape).index_add_(0, tokens.flatten(), rows)


def sharded_embedding(tokens: torch.Tensor, weight: torch.Tensor, group: Group, sequence: bool) -> torch.Tensor:
    """Returns the embeddings [B, S, H] of tokens [B, S] from the whole vocabulary; weight [V, H] is this rank's part.

    With `sequence`, returns only this rank's slice of the sequence, [B, S / group.size, H].
    """
    local = tokens - group.rank * weight.shape[0]
    elsewhere = (local < 0) | (local >= weight.shape[0])
    partial = embedding(local.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0)
    return scatter_to(partial, group, dim=1) if sequence else reduce_from(partial, group)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocabulary: int,
    group: Group | None = None,
    chunk_loss: ChunkLoss | None = None,
    products: Products = torch_products,
) -> torch.Tensor:
    """Returns the sum over tokens of -log softmax(x @ weight.T)[label], a scalar in at least float32.

    x [N, H] is the same on every rank of `group`. weight [V, H] is this rank's rows. labels [N] are IGNORED for tokens that add
    nothing to the loss. `vocabulary` is the number of real rows over all ranks; the rows after them are padding and not part of the
    softmax. The gradient of the loss with respect to x is only this rank's part; the whole gradient is the sum over the group (see
    `enter` in tensor.py). `chunk_loss` takes the place of `loss_and_gradient`. `products` computes the matrix products.
    """
    chunk_loss = chunk_loss or loss_and_gradient
    loss: torch.Tensor = _LinearCrossEntropy.apply(
        x, weight, labels, vocabulary, group, chunk_loss, products, torch.is_grad_enabled()
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        vocabulary: int,
        group: Group | None,
        chunk_loss: ChunkLoss,
        products: Products,
        differentiate: bool,
    ) -> torch.Tensor:
        start = group.rank * weight.shape[0] if group else 0
        valid = max(0, min(weight.shape[0], vocabulary - start))
        dtype = multiply_dtype(weight)
        rows = products.operand(weight[:valid], dtype)
        backward = differentiate and any(ctx.needs_input_grad[:2])  # needs_input_grad is true under no_grad too
        sink = gradient_sink(weight)
        if backward and sink is not None:
            sink.settle()  # logits take the most memory of a whole step
        grad_x = torch.empty_like(x, dtype=rows.dtype) if backward else None
        grad_weight: torch.Tensor | None = None
        total = x.new_zeros((), dtype=accurate_dtype(x.dtype))
        for begin in range(0, max(1, x.shape[0]), HEAD_CHUNK_TOKENS):
            tokens = slice(begin, begin + HEAD_CHUNK_TOKENS)
            chunk = products.operand(x[tokens], dtype)
            logits = products.outputs(chunk, rows, dtype=dtype)
            loss, grad_logits = chunk_loss(logits, labels[tokens] - start, labels[tokens] != IGNORED, group)
            del logits
            total += loss
            if grad_x is not None:
                products.plus_input_gradient(None, grad_logits, rows, into=grad_x[tokens])
                if ctx.needs_input_grad[1]:
                    if grad_weight is None:
                        grad_weight = weight.new_empty(weight.shape, dtype=accurate_dtype(weight.dtype))
                        grad_weight[valid:].zero_()  # padding
                    products.add_weight_gradient(grad_weight[:valid], grad_logits, chunk, fresh=begin == 0)
            del grad_logits  # those of the next chunk need the memory
        if grad_x is not None:
            ctx.save_for_backward(grad_x.to(x.dtype), grad_weight)
            ctx.sink = sink
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_x, grad_weight = ctx.saved_tensors
        scale = grads[0]  # kept as a scalar, which does not widen the products; rounding it to 16 bits would bias all of them
        rest: tuple[torch.Tensor | None, ...] = (None,) * 6
        if grad_weight is None:
            return grad_x * scale, None, *rest
        if ctx.sink is not None:
            ctx.sink.add(grad_weight, scale)
            return grad_x * scale, None, *rest
        return grad_x * scale, grad_weight.to(scale.dtype) * scale, *rest


def loss_and_gradient(
    logits: torch.Tensor, target: torch.Tensor, counts: torch.Tensor, group: Group | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a chunk's summed loss, in at least float32, and its gradient with respect to `logits` [n, V], in their dtype, for
    which it may overwrite them. `counts` [n]: whether the token adds to the loss. `target` [n] is relative to this rank's first
    row. Collective over `group`."""
    owned = counts & (target >= 0) & (target < logits.shape[1])
    row = torch.where(owned, target, 0).unsqueeze(1)
    wide = logits.to(accurate_dtype(logits.dtype))
    high = wide.amax(1, keepdim=True) if wide.shape[1] else wide.new_full((wide.shape[0], 1), -torch.inf)
    if group and group.size > 1:
        group.all_reduce(high, "max")
    wide -= high
    sums = wide.new_zeros((2, wide.shape[0]))
    if wide.shape[1]:
        sums[0] = torch.where(owned, wide.gather(1, row).squeeze(1), 0)
        wide.exp_()
        sums[1] = wide.sum(1)
    if group and group.size > 1:
        group.all_reduce(sums)
    loss = torch.where(counts, sums[1].log() - sums[0], 0).sum()
    wide *= torch.where(counts, sums[1].reciprocal(), 0).unsqueeze(1)
    if wide.shape[1]:
        wide.scatter_add_(1, row, -owned.to(wide.dtype).unsqueeze(1))
    return loss, wide if wide is logits else logits.copy_(wide)
