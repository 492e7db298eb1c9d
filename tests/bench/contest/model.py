"""The plain model: the decoder as one would write it by hand in PyTorch, with torch's fused operators where they exist.

Shapes: B batch, S sequence, T = B * S tokens, H hidden, N heads, D head size, E experts, K experts per token.

`wide=True` keeps weights and activations as they are (bfloat16) but multiplies matrices and attends in float32: on
CPUs without bfloat16 instructions that is several times faster than bfloat16 arithmetic, so an honest baseline has it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contest.shapes import Shape


class WideLinear(torch.autograd.Function):
    """y = x @ weight.T in float32, whatever the operands are; saves the operands, not their float32 copies."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient = gradients[0].float()
        grad_weight = gradient.flatten(0, -2).t() @ x.float().flatten(0, -2)
        return (gradient @ weight.float()).to(x.dtype), grad_weight.to(weight.dtype)


class Linear(nn.Linear):
    """Matrix multiplication without bias; weight [out, in]."""

    def __init__(self, inputs: int, outputs: int, wide: bool) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=0.02)
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        return WideLinear.apply(x, self.weight) if self.wide else F.linear(x, self.weight)  # type: ignore[no-untyped-call]


class Norm(nn.Module):
    """RMSNorm over H."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden))
        self.epsilon = shape.norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon)


def rotary_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [S, D]; with them the rotation is x * cos + roll(x, D / 2) * sin."""
    frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angle = torch.outer(torch.arange(shape.sequence, dtype=torch.float32), frequency)
    return torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)


class Attention(nn.Module):
    """Causal self-attention of all heads."""

    def __init__(self, shape: Shape, wide: bool) -> None:
        super().__init__()
        self.query = Linear(shape.hidden, shape.hidden, wide)
        self.key = Linear(shape.hidden, shape.hidden, wide)
        self.value = Linear(shape.hidden, shape.hidden, wide)
        self.output = Linear(shape.hidden, shape.hidden, wide)
        self.head_dim, self.wide = shape.head_dim, wide

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, N, S, D]
                   for project in (self.query, self.key, self.value))  # fmt: skip
        half = self.head_dim // 2
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q = q * cos + q.roll(half, -1) * sin
        k = k * cos + k.roll(half, -1) * sin
        if self.wide:
            mixed = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True).to(x.dtype)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU; also one expert."""

    def __init__(self, shape: Shape, wide: bool) -> None:
        super().__init__()
        self.gate = Linear(shape.hidden, shape.ffn, wide)
        self.up = Linear(shape.hidden, shape.ffn, wide)
        self.down = Linear(shape.ffn, shape.hidden, wide)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Mixture(nn.Module):
    """Dropless top-K mixture: tokens sorted by expert, each expert runs once on its own slice, with zeros behind it to a multiple
    of `rows`, so that matrix products meet few shapes."""

    def __init__(self, shape: Shape, wide: bool, rows: int = 1) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(shape.experts, shape.hidden) * 0.02)
        self.experts = nn.ModuleList(FeedForward(shape, wide) for _ in range(shape.experts))
        self.top_k, self.rows = shape.top_k, rows

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, H] -> output [B, S, H], balance loss: mean over B of E * sum over E of share * probability."""
        with torch.autocast(x.device.type, enabled=False):
            probability = F.linear(x.float(), self.router.float()).softmax(-1)  # [B, S, E], float32
        weight, chosen = probability.topk(self.top_k, -1)  # [B, S, K]
        weight = weight / weight.sum(-1, keepdim=True)

        order = chosen.flatten().argsort(stable=True)  # [T * K], by expert
        sizes = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = x.flatten(0, 1).index_select(0, order // self.top_k).split(sizes)  # type: ignore[no-untyped-call]
        result = torch.cat([self._padded(expert, part) for expert, part in zip(self.experts, parts, strict=True)])
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        picked = result.index_select(0, back).view(-1, self.top_k, x.shape[-1])  # [T, K, H]
        output = (picked * weight.flatten(0, 1).unsqueeze(-1).to(picked.dtype)).sum(1).view_as(x)

        share = F.one_hot(chosen, len(self.experts)).sum(2).float().mean(1) / self.top_k  # [B, E]
        return output, len(self.experts) * (share * probability.mean(1)).sum(-1).mean()

    def _padded(self, expert: nn.Module, part: Tensor) -> Tensor:
        missing = -len(part) % self.rows
        return expert(F.pad(part, (0, 0, 0, missing)))[: len(part)] if missing else expert(part)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and feed-forward (or mixture), each after a norm and around a residual."""

    def __init__(self, shape: Shape, wide: bool, rows: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(shape), Attention(shape, wide)
        self.feed_norm = Norm(shape)
        self.feed = Mixture(shape, wide, rows) if shape.experts else FeedForward(shape, wide)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        result = self.feed(self.feed_norm(x))
        output, balance = result if isinstance(result, tuple) else (result, None)
        return x + output, balance


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [B, S, V], labels [B, S] -> mean cross-entropy in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class Decoder(nn.Module):
    """The whole model, returning its own loss."""

    def __init__(self, shape: Shape, wide: bool = False, rows: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(shape, wide, rows) for _ in range(shape.layers))
        self.norm = Norm(shape)
        self.head = Linear(shape.hidden, shape.vocab, wide)
        self.balance_loss = shape.balance_loss
        cos, sin = rotary_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """inputs, labels [B, S] -> mean token cross-entropy plus the weighted balance losses (scalar, float32)."""
        x = self.embedding(inputs)
        penalties = []
        for layer in self.layers:
            x, balance = layer(x, self.cos, self.sin)
            if balance is not None:
                penalties.append(balance)
        loss = token_loss(self.head(self.norm(x)), labels)
        return loss + self.balance_loss * torch.stack(penalties).sum() if penalties else loss
