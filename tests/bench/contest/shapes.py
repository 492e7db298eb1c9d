"""The known work: shapes that every contestant trains, spelt out so that the baselines owe nothing to Bagualu."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One decoder and its batch. Llama-style: RMSNorm, rotary positions, SwiGLU, no biases, head of its own."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    """Hidden width of the feed-forward, or of one expert."""
    vocab: int
    sequence: int
    batch: int
    """Sequences per optimizer step, over all processes."""
    experts: int = 0
    """0: dense; otherwise every layer is a mixture."""
    top_k: int = 2

    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    balance_loss: float = 0.01

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.sequence * self.batch

    @property
    def parameters(self) -> int:
        """Elements of the whole model."""
        feed_forward = 3 * self.hidden * self.ffn * max(1, self.experts) + self.hidden * self.experts
        layer = 4 * self.hidden**2 + feed_forward + 2 * self.hidden
        return self.layers * layer + 2 * self.vocab * self.hidden + self.hidden

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs, forward and backward: 6 per multiplied weight; causal attention counts as half a square."""
        active = self.top_k if self.experts else 1
        weights = 4 * self.hidden**2 + active * 3 * self.hidden * self.ffn + self.experts * self.hidden
        attention = 2 * self.sequence * self.hidden  # two matmuls, 2 FLOPs each, half of the square
        return 6.0 * (self.layers * weights + self.vocab * self.hidden) + 3.0 * self.layers * attention


SHAPES = {
    "bench_dense": Shape(layers=8, hidden=512, heads=8, ffn=1344, vocab=8192, sequence=256, batch=8),
    "bench_dense_124m": Shape(layers=12, hidden=768, heads=12, ffn=2048, vocab=32000, sequence=512, batch=4),
    "bench_dense_1b": Shape(layers=16, hidden=2048, heads=16, ffn=5632, vocab=32000, sequence=4096, batch=4),
    "bench_moe": Shape(layers=6, hidden=512, heads=8, ffn=704, vocab=8192, sequence=256, batch=8, experts=8),
    "bench_moe_2b": Shape(layers=4, hidden=2048, heads=16, ffn=1024, vocab=32000, sequence=4096, batch=4, experts=64, top_k=8),
}
