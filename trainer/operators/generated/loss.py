"""A chunk's cross-entropy loss and its gradient in generated kernels. Shapes: n tokens, V vocabulary rows."""

import torch

from bagualu.comm.group import Group
from bagualu.parallel.precision import accurate_dtype
from bagualu.trainer.operators.kernel import fails, kernel_with_sums


def loss_and_gradient(
    logits: torch.Tensor, target: torch.Tensor, counts: torch.Tensor, group: Group | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss and the gradient that `parallel.vocabulary.loss_and_gradient` returns, where one rank holds the whole
    vocabulary."""
    return _loss_and_gradient(logits, target, counts)  # type: ignore[no-any-return]


def takes(logits: torch.Tensor, target: torch.Tensor, counts: torch.Tensor, group: Group | None) -> bool:
    """Returns whether `loss_and_gradient` can compute this: softmax statistics of one rank, of at least one row."""
    return (group is None or group.size == 1) and logits.shape[1] > 0


loss_and_gradient.takes, loss_and_gradient.fails = takes, fails  # type: ignore[attr-defined]


@kernel_with_sums
def _loss_and_gradient(logits: torch.Tensor, target: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = logits.to(accurate_dtype(logits.dtype))
    owned = counts & (target >= 0) & (target < logits.shape[1])
    row = torch.where(owned, target, 0).unsqueeze(1)
    high = wide.amax(1, keepdim=True)
    powers = (wide - high).exp()
    total = powers.sum(1, keepdim=True)
    own = torch.where(owned, (wide.gather(1, row) - high).squeeze(1), 0)
    loss = torch.where(counts, total.log().squeeze(1) - own, 0).sum()
    hit = (torch.arange(logits.shape[1], device=logits.device) == row) & owned.unsqueeze(1)
    return loss, torch.where(counts.unsqueeze(1), powers / total - hit.to(wide.dtype), 0).to(logits.dtype)
