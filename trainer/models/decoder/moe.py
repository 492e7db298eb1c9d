"""Mixture of experts: a router, experts, and two ways to even out the load of the experts: a loss and biases.

Shapes: B micro-batch, S sequence, H hidden, E experts, K experts per token, T = B * S tokens, N = T * K rows.

Dropless: every token reaches all of its experts, whatever the load. This file does not know which rank holds an expert: `exchange`
sends rows, sorted by expert, to the ranks of their experts and returns the results (parallel/expert.py).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from bagualu.parallel.expert import LocalExperts
from bagualu.parallel.precision import accurate_dtype
from bagualu.trainer.models.decoder.adapted import AdaptedModule, first_factors, plus_products
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.layers import FeedForward, gelu
from bagualu.trainer.operators.linear import grouped_linears, linears
from bagualu.trainer.operators.operator_set import BY_RULE, OperatorSet
from bagualu.trainer.operators.ragged import pad, unpad


class Experts(AdaptedModule):
    """The experts on this rank, each a feed-forward: gate, if there is one, and up [E, F, H], down [E, H, F]."""

    def __init__(self, config: ModelConfig, operators: OperatorSet = BY_RULE) -> None:
        super().__init__()
        self.operators = operators
        shape = config.moe.experts, config.moe.ffn, config.hidden
        self.gate = nn.Parameter(torch.empty(shape)) if config.gated else None
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(config.moe.experts, config.hidden, config.moe.ffn))
        self.exchange = LocalExperts()

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """rows [N, H] sorted by expert, counts [E] the number of rows of each expert of the layer -> results [N, H] in the same
        order"""
        routed = self.exchange.dispatch(rows, counts)
        padded, rows_of = pad(routed.rows, routed.counts)
        if self.gate is None:
            (up,) = self._multiply(padded, rows_of, "up")
            (results,) = self._multiply(gelu(up), rows_of, "down")
        else:
            gate, up = self._multiply(padded, rows_of, "gate", "up")
            gated, factor = self.operators.gate(gate, up)
            (results,) = self._multiply(gated, rows_of, "down", factor=factor)
        return self.exchange.combine(unpad(results, routed.counts, rows_of), routed)

    def _multiply(
        self, rows: torch.Tensor, counts: list[int], *keys: str, factor: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """rows [n, ...] sorted by expert, counts [e] -> an output for each weight of `keys`. `factor` as in `linears`."""
        factors = [self.factors(key) for key in keys]
        weights = [*(getattr(self, key) for key in keys), *first_factors(factors)]
        multiply = partial(grouped_linears, products=self.products)
        results = multiply(rows, counts, *weights, factor=factor)
        return plus_products(results, factors, lambda low, weight: multiply(low, counts, weight)[0])


class Router(nn.Module):
    """Weight [E, H]. `bias` [E] is a buffer, which `update_biases` changes and no gradient does; None without bias_rate."""

    bias: torch.Tensor | None

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.experts, hidden))
        self.top_k, self.renormalises = config.top_k, config.renormalises
        self.register_buffer("bias", torch.zeros(config.experts) if config.has_bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, H] -> the probabilities of the experts [B, S, E], in at least float32"""
        (scores,) = linears(x, self.weight, wide=True, dtype=accurate_dtype(x.dtype))
        return scores.softmax(-1)

    def choose(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """probabilities [B, S, E] -> the weights of the chosen experts and their numbers, both [B, S, K]"""
        if self.bias is None:
            weights, chosen = probabilities.topk(self.top_k, dim=-1)
        else:
            chosen = (probabilities + self.bias).topk(self.top_k, dim=-1).indices
            weights = probabilities.gather(-1, chosen)
        return (weights / weights.sum(-1, keepdim=True) if self.renormalises else weights), chosen


class MixtureOfExperts(nn.Module):
    """Takes the place of a feed-forward. `forward` also returns the balance loss, summed over the micro-batch's sequences, and the
    load: how many tokens of the micro-batch each expert got."""

    def __init__(self, config: ModelConfig, operators: OperatorSet = BY_RULE) -> None:
        super().__init__()
        self.router = Router(config.hidden, config.moe)
        self.experts = Experts(config, operators)
        shared = config.moe.shared_experts
        self.shared = FeedForward(config, shared * config.moe.ffn, bias=False, operators=operators) if shared else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, S, H] -> [B, S, H], loss, load [E]"""
        tokens = x.flatten(0, 1)
        probabilities = self.router(x)
        weights, chosen = self.router.choose(probabilities)
        experts = chosen.flatten()  # [N]
        order = experts.argsort(stable=True)
        counts = experts.new_zeros(probabilities.shape[-1]).scatter_add_(0, experts, torch.ones_like(experts))
        results = self.experts(tokens[order // self.router.top_k], counts)
        by_token = torch.empty_like(results).index_copy(0, order, results).view(*chosen.shape, -1)  # [B, S, K, H]
        mixed = (by_token * weights.to(x.dtype).unsqueeze(-1)).sum(2)
        if self.shared is not None:
            mixed = mixed + self.shared(x)
        return mixed, balance_loss(probabilities, chosen), counts


def balance_loss(probabilities: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """E / (K S) * sum over experts of (tokens that chose it) * (its mean probability), for each sequence, summed over sequences.

    probabilities [B, S, E], chosen [B, S, K]. 1 for a sequence whose load is even. Per sequence, so it depends neither on the
    layout nor on the micro-batch (arXiv 2412.19437, equations 17 to 20).
    """
    experts, (_, length, top_k) = probabilities.shape[-1], chosen.shape
    ones = torch.ones_like(chosen, dtype=probabilities.dtype).flatten(1)
    load = torch.zeros_like(probabilities[:, 0]).scatter_add(1, chosen.flatten(1), ones)  # [B, E]
    return (load * probabilities.mean(1)).sum() * experts / (top_k * length)


def update_biases(loads: torch.Tensor, biases: Sequence[torch.Tensor], rate: float) -> None:
    """Balances the load without a loss (arXiv 2408.15664): raises by `rate` the bias of every expert that got fewer tokens than the
    mean of its layer, and lowers by as much that of every expert that got more.

    loads [layers, E]: the tokens of a whole step. biases: [E] each, changed in place.
    """
    for bias, load in zip(biases, loads, strict=True):
        bias.add_((load.mean() - load).sign(), alpha=rate)
