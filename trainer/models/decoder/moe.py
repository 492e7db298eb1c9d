"""Mixture of experts: a router, experts, and the loss that keeps the router from favouring a few.

Shapes: B micro-batch, S sequence, H hidden, E experts, K experts per token, T = B * S tokens, N = T * K rows.

Dropless: every token reaches all of its experts, whatever the load. Which rank holds an expert is not known here: `exchange`
takes rows sorted by expert to where they belong and brings results back (parallel/expert.py).
"""

import torch
import torch.nn.functional as F
from torch import nn

from bagualu.parallel.expert import LocalExperts
from bagualu.parallel.precision import accurate_dtype
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.layers import FeedForward, Linear
from bagualu.trainer.operators.linear import grouped_linears, linears


class Experts(nn.Module):
    """The experts held here, each a SwiGLU: gate and up [E, F, H], down [E, H, F]."""

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(config.experts, config.ffn, hidden))
        self.up = nn.Parameter(torch.empty(config.experts, config.ffn, hidden))
        self.down = nn.Parameter(torch.empty(config.experts, hidden, config.ffn))
        self.exchange = LocalExperts()

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """rows [N, H] sorted by expert, counts [E] over all experts -> results [N, H] in the same order."""
        routed = self.exchange.dispatch(rows, counts)
        gate, up = grouped_linears(routed.rows, routed.counts, self.gate, self.up)
        (results,) = grouped_linears(F.silu(gate), routed.counts, self.down, factor=up)
        return self.exchange.combine(results, routed)


class MixtureOfExperts(nn.Module):
    """Takes the place of a feed-forward; also returns the load-balancing loss, summed over the micro-batch's sequences."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.moe.top_k
        self.renormalises = config.moe.renormalises
        self.router = Linear(config.hidden, config.moe.experts)
        self.experts = Experts(config.hidden, config.moe)
        self.shared = FeedForward(config.hidden, config.moe.shared_experts * config.moe.ffn) if config.moe.shared_experts else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, S, H] -> [B, S, H], loss"""
        tokens = x.flatten(0, 1)
        probabilities = self._route(x)  # [B, S, E]
        weights, chosen = probabilities.topk(self.top_k, dim=-1)  # [B, S, K]
        if self.renormalises:
            weights = weights / weights.sum(-1, keepdim=True)
        experts = chosen.flatten()  # [N]
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=probabilities.shape[-1])
        results = self.experts(tokens[order // self.top_k], counts)
        by_token = torch.empty_like(results).index_copy(0, order, results).view(*chosen.shape, -1)  # [B, S, K, H]
        mixed = (by_token * weights.to(x.dtype).unsqueeze(-1)).sum(2)
        if self.shared is not None:
            mixed = mixed + self.shared(x)
        return mixed, balance_loss(probabilities, chosen)

    def _route(self, x: torch.Tensor) -> torch.Tensor:
        (scores,) = linears(x, self.router.weight, wide=True, dtype=accurate_dtype(x.dtype))
        return scores.softmax(-1)


def balance_loss(probabilities: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """E / (K S) * sum over experts of (tokens that chose it) * (its mean probability), for each sequence, summed over sequences.

    probabilities [B, S, E], chosen [B, S, K]. 1 for a sequence whose load is even. Per sequence, so it depends neither on the
    layout nor on the micro-batch (arXiv 2412.19437, equations 17 to 20).
    """
    experts, (_, length, top_k) = probabilities.shape[-1], chosen.shape
    ones = torch.ones_like(chosen, dtype=probabilities.dtype).flatten(1)
    load = torch.zeros_like(probabilities[:, 0]).scatter_add(1, chosen.flatten(1), ones)  # [B, E]
    return (load * probabilities.mean(1)).sum() * experts / (top_k * length)
