"""The optimizer's update by AdamW (arXiv 1711.05101) over flat buffers, in place. Shapes: n elements."""

import torch

PIECE = 2**19
"""The number of elements that a CPU updates in one call: their weights, moments and gradients fit into its cache."""


def adamw(
    weight: torch.Tensor,
    working: torch.Tensor,
    gradient: torch.Tensor,
    average: torch.Tensor,
    square: torch.Tensor,
    step: torch.Tensor,
    factor: float,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """Updates the master weights `weight`, the moments `average` and `square` and the `working` weights, which are the master
    weights rounded to their dtype or are the same memory. All are [n], and all but `working` have the same dtype.

    The gradient is first multiplied by `factor`; its values may be overwritten. `step`: the number of updates, this one included, a
    float32 scalar. Decay is decoupled.

    This variant calls the fused kernel of torch.optim.AdamW directly: torch's optimizer would import torch's compiler, which takes
    a second and 70 MB, and can only update a tensor as a whole.
    """
    if factor != 1.0:
        gradient.mul_(factor)
    torch._fused_adamw_(
        [weight], [gradient], [average], [square], [], [step], lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay,
        eps=epsilon, amsgrad=False, maximize=False,
    )  # fmt: skip
    if not same_memory(weight, working):
        working.copy_(weight)


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Returns whether flat tensors begin at the same element of the same storage."""
    return one.untyped_storage() is other.untyped_storage() and one.storage_offset() == other.storage_offset()
