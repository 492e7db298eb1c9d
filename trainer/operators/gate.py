"""The gated unit of a feed-forward: silu(gate) * up (arXiv 2002.05202). F: width of the feed-forward."""

import torch
import torch.nn.functional as F


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns two tensors [..., F] whose product is silu(gate) * up, given gate and up [..., F]; a variant that computes the
    product returns it with None. The linear layer after it takes both as `x` and `factor` of `linears`, which multiplies them
    again in its backward pass instead of saving the product."""
    return F.silu(gate), up
