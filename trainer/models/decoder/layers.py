"""The blocks of the decoder, in plain PyTorch over whatever slice of the weights they hold.

Shapes: B micro-batch, S sequence, H hidden, A heads here, D head width, F feed-forward width here. A module reads the number of
its heads or columns from its weights, so it works the same on a whole matrix and on a part of one.
"""

import torch
import torch.nn.functional as F
from torch import nn

from bagualu.parallel.precision import accurate_dtype
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.operators.attention import causal_attention
from bagualu.trainer.operators.linear import linears, rms_norm, rotate


class Linear(nn.Module):
    """A weight [O, I]; applied by whoever holds it, so that layers with one input go through `linears` together."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class RotaryPositions:
    """cos and sin [S, D] of the angles position * theta^(-2i / D), as `rotate` takes them, computed in float64 and kept for the
    last shape asked."""

    def __init__(self, head_dim: int, theta: float) -> None:
        self.head_dim = head_dim
        self.theta = theta
        self._kept: dict[tuple[int, torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        key = (length, dtype, device)
        if key not in self._kept:
            steps = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device)
            angles = torch.arange(length, dtype=torch.float64, device=device).outer(self.theta ** (-steps / self.head_dim))
            both = torch.cat((-angles, angles), -1)
            self._kept = {key: (both.cos().to(accurate_dtype(dtype)), both.sin().to(accurate_dtype(dtype)))}
        return self._kept[key]


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = Linear(config.hidden, config.hidden)
        self.key = Linear(config.hidden, config.key_value_heads * config.head_dim)
        self.value = Linear(config.hidden, config.key_value_heads * config.head_dim)
        self.output = Linear(config.hidden, config.hidden)
        self.positions = RotaryPositions(config.head_dim, config.rope_theta)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, H] -> [B, S, H]"""
        cos, sin = self.positions(x.shape[1], x.dtype, x.device)
        projected = linears(x, self.query.weight, self.key.weight, self.value.weight, wide=True)
        query, key, value = (t.unflatten(-1, (-1, self.head_dim)) for t in projected)  # [B, S, A, D]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = causal_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return linears(mixed.transpose(1, 2).flatten(2), self.output.weight)[0]


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate = Linear(hidden, ffn)
        self.up = Linear(hidden, ffn)
        self.down = Linear(ffn, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> [..., H]"""
        gate, up = linears(x, self.gate.weight, self.up.weight)
        return linears(F.silu(gate), self.down.weight, factor=up)[0]
