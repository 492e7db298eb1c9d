"""The blocks of the decoder, in plain PyTorch over whatever slice of the weights they hold.

Shapes: B micro-batch, S sequence, H hidden, A heads on this rank, D head width, F feed-forward width on this rank. A module reads
the number of its heads or columns from its weights, so it works on a whole matrix and on a part of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from bagualu.comm.group import Group
from bagualu.trainer.models.decoder.adapted import AdaptedModule, first_factors, plus_products
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.operators.alibi import Slopes
from bagualu.trainer.operators.linear import linears
from bagualu.trainer.operators.operator_set import BY_RULE, OperatorSet
from bagualu.trainer.operators.rotary import RotaryPositions, Scaling, SlowRotations, Yarn

gelu = partial(F.gelu, approximate="tanh")
Attend = Callable[..., torch.Tensor]
Positions = Callable[[int, torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]]
"""(S, dtype of the activations, device) -> cos and sin [S, D]; see `operators.rotary`."""


class Linear(AdaptedModule):
    """Holds a weight [O, I] and, if there is one, a bias [O]. The parent module applies them, so that several weights with the same
    input go through `linears` together."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.frozen: FrozenLayers | None = None
        """Takes the place of the weights of this and other layers once they are not trained any more (frozen.py)."""


@dataclass(frozen=True)
class FrozenLayers:
    """The weights [O, I] and biases [O] of linear layers with the same input, one below the other. `widths`: the number of outputs
    of each."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    widths: tuple[int, ...]

    def outputs(
        self, x: torch.Tensor, factor: torch.Tensor | None = None, wide: bool = False, biased: bool = True
    ) -> tuple[torch.Tensor, ...]:
        """Returns what `project` would return for these layers, given x [..., I]: an output [..., O] of each."""
        (output,) = linears(x, self.weight, biases=(self.bias if biased else None,), factor=factor, wide=wide)
        return output.split(self.widths, -1) if len(self.widths) > 1 else (output,)


def project(
    x: torch.Tensor, *layers: Linear, wide: bool = False, biased: bool = True, factor: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """x [..., I] -> an output [..., O] of each linear layer, without its bias if `biased` is False. `factor` as in `linears`."""
    if (frozen := layers[0].frozen) is not None:
        return frozen.outputs(x, factor, wide, biased)
    factors = [layer.factors("weight") for layer in layers]
    weights = [*(layer.weight for layer in layers), *first_factors(factors)]
    biases = [layer.bias if biased else None for layer in layers] + [None] * (len(weights) - len(layers))
    multiply = partial(linears, wide=wide, products=layers[0].products)
    results = multiply(x, *weights, biases=biases, factor=factor)
    return plus_products(results, factors, lambda rows, weight: multiply(rows, weight)[0])


class RMSNorm(nn.Module):
    """`group` is set where the width is split over ranks: those that hold its parts."""

    def __init__(self, width: int, epsilon: float, operators: OperatorSet = BY_RULE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon, self.operators = epsilon, operators
        self.group: Group | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operators.norm(x, self.weight, self.epsilon, group=self.group)


class LayerNorm(nn.Module):
    def __init__(self, width: int, epsilon: float, operators: OperatorSet = BY_RULE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.epsilon, self.operators = epsilon, operators

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operators.norm(x, self.weight, self.epsilon, self.bias)


def norm_of(config: ModelConfig, operators: OperatorSet = BY_RULE) -> RMSNorm | LayerNorm:
    """Returns a norm of the hidden states [..., H]."""
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.hidden, config.norm_epsilon, operators)


class Attention(nn.Module):
    """Self-attention with grouped key and value heads (arXiv 2305.13245).

    Two attributes can be replaced, by a chip's own kernel, parallelism over the sequence or generation with a cache: `attend` mixes
    query [B, A, S, D] with key and value, which have fewer heads if heads are grouped, to [B, A, S, D], and gets the slopes [A] as
    a fourth argument if the model has any (`operators.alibi`); `positions`, None without rotary positions, gives cos and sin of the
    angles of the S tokens that this rank holds. Whatever replaces `attend` must let each token attend to its latest `window` tokens
    only, unless `window` is None.
    """

    def __init__(
        self, config: ModelConfig, window: int | None = None, scaled: bool = False, operators: OperatorSet = BY_RULE
    ) -> None:
        """`window` and `scaled` are `ModelConfig.window_of` and `ModelConfig.scales_rotations` of the layer."""
        super().__init__()
        self.operators = operators
        self.head_dim, self.window, self.norms_all_heads = config.head_width, window, config.qk_norm_over == "all"
        wide, narrow = (heads * config.head_width for heads in (config.heads, config.key_value_heads))
        biased = config.bias != "none"
        self.query = Linear(config.hidden, wide, biased)
        self.key = Linear(config.hidden, narrow, biased)
        self.value = Linear(config.hidden, narrow, biased)
        self.output = Linear(wide, config.hidden, config.bias == "all")
        normed = (wide, narrow) if self.norms_all_heads else (self.head_dim, self.head_dim)
        self.query_norm, self.key_norm = (RMSNorm(n, config.norm_epsilon, operators) if config.qk_norm else None for n in normed)
        self.positions: Positions | None = _rotations(config, scaled) if config.positions == "rotary" else None
        self.slopes = Slopes(config.heads) if config.positions == "alibi" else None
        attend = operators.attention
        self.attend: Attend = attend if window is None else partial(attend, window=window)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, S, H] -> [B, S, H], without the output's bias. `mask` [B, 1, S, S] as in `operators.documents`; `attend` gets it by
        that name if it is not None."""
        return project(self._mixed(x, mask), self.output, biased=False)[0]

    def _mixed(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Returns the input [B, S, A * D] of the last product. What led to it is forgotten, unless the backward pass needs it."""
        query, key, value = project(x, self.query, self.key, self.value, wide=True)
        norms = self.query_norm, self.key_norm
        if self.norms_all_heads:
            query, key = _normed(norms, query, key)
        query, key, value = (t.unflatten(-1, (-1, self.head_dim)) for t in (query, key, value))  # [B, S, A, D]
        if not self.norms_all_heads:
            query, key = _normed(norms, query, key)
        if self.positions is not None:
            cos, sin = self.positions(x.shape[1], x.dtype, x.device)
            rotate = self.operators.rotary
            if x.shape[1] == 1:  # for one token, an operator takes longer than what it computes
                both = rotate(torch.cat((query, key), 2), cos, sin)
                query, key = both.split((query.shape[2], key.shape[2]), 2)
            else:
                query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        slopes = () if self.slopes is None else (self.slopes(query.shape[2], x.dtype, x.device),)
        attend = self.attend if mask is None else partial(self.attend, mask=mask)
        mixed = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), *slopes)
        return mixed.transpose(1, 2).flatten(2)


def _rotations(config: ModelConfig, scaled: bool) -> RotaryPositions:
    """`scaled`: whether the layer is one of those whose rotations model.rope_scaling changes."""
    if not scaled:
        return RotaryPositions(config.head_width, config.rope_theta)
    factor, positions = config.rope_factor, config.rope_original_positions
    scalings = {
        "linear": Scaling(factor),
        "llama3": SlowRotations(factor, config.rope_low_frequency_factor, config.rope_high_frequency_factor, positions),
        "yarn": Yarn(factor, config.rope_beta_slow, config.rope_beta_fast, positions, config.rope_theta),
    }
    return RotaryPositions(config.head_width, config.rope_theta, scalings[config.rope_scaling], config.rope_amplitude)


def _normed(norms: Sequence[RMSNorm | None], *x: torch.Tensor) -> list[torch.Tensor]:
    return [one if norm is None else norm(one) for norm, one in zip(norms, x, strict=True)]


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202). Without a gate: down(gelu(up(x))), with the tanh form of GELU (arXiv
    1606.08415, section 2)."""

    def __init__(self, config: ModelConfig, ffn: int, bias: bool, operators: OperatorSet = BY_RULE) -> None:
        super().__init__()
        self.operators = operators
        self.gate = Linear(config.hidden, ffn, bias) if config.gated else None
        self.up = Linear(config.hidden, ffn, bias)
        self.down = Linear(ffn, config.hidden, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> [..., H], without the bias of `down`"""
        if self.gate is None:
            (up,) = project(x, self.up)
            return project(gelu(up), self.down, biased=False)[0]
        gate, up = project(x, self.gate, self.up)
        gated, factor = self.operators.gate(gate, up)
        return project(gated, self.down, biased=False, factor=factor)[0]
