"""The decoder's sharding plan."""

from collections.abc import Iterator
from dataclasses import replace

from bagualu.parallel.sharding import BoundaryKind, InitialValues, Placement, ShardingPlan
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.lora import FIRST, SECOND

ROWS = Placement(((0, "tensor"),))
"""Dim 0 of a weight (its rows, the outputs) is split over the tensor axis: each rank computes a part of the output (column
parallel in Megatron's terms)."""
COLUMNS = Placement(((1, "tensor"),), initial="residual")
"""Dim 1 of a weight (its columns, the inputs) is split over the tensor axis: each rank reads a part of the input, and the ranks'
outputs are summed (row parallel in Megatron's terms)."""
_LINEAR = (
    ("layers.*.attention.output.weight", COLUMNS),
    ("layers.*.attention.*.weight", ROWS),
    ("layers.*.feed_forward.experts.down", Placement(((0, "expert"), (2, "tensor")), initial="residual")),
    ("layers.*.feed_forward.experts.*", Placement(((0, "expert"), (1, "tensor")))),
    ("layers.*.down.weight", COLUMNS),
    ("layers.*.feed_forward.*.weight", ROWS),
)
"""The weights of linear layers in decoder layers, without routers. Those of the other patterns of the plan come before them."""


def decoder_plan(config: ModelConfig, sequence: bool) -> ShardingPlan:
    """Returns the placement of every parameter and buffer. With `sequence` (parallelism), norms, learned positions and
    the biases of a block's output see only a slice of the sequence, so each rank has only a part of their gradient."""
    vocabulary = replace(ROWS, rows=config.vocab)
    norm = Placement(partial_over="tensor" if sequence else None, initial="ones")
    of_heads = Placement(partial_over="tensor", initial="ones")
    over_all = config.qk_norm_over == "all"
    zeros = replace(norm, initial="zeros")
    placements = (
        *(_factors() if config.lora.rank else ()),
        ("embedding.weight", vocabulary),
        ("head.weight", vocabulary),
        ("embedding.positions.weight", replace(norm, initial="normal")),
        # Each tensor rank normalises its own heads, so it has only a part of the gradient of a weight that all heads share.
        ("layers.*.attention.*_norm.weight", replace(ROWS, initial="ones") if over_all else of_heads),
        ("*norm.weight", norm),
        ("*norm.bias", zeros),
        ("layers.*.attention.output.bias", zeros),
        ("layers.*.attention.*.bias", replace(ROWS, initial="zeros")),
        # All tensor ranks route the same tokens, but each sees only a part of the experts' results.
        ("layers.*.feed_forward.router.weight", Placement(partial_over="tensor")),
        ("layers.*.feed_forward.router.bias", Placement(initial="zeros")),
        ("layers.*.down.bias", zeros),
        ("layers.*.feed_forward.*.bias", replace(ROWS, initial="zeros")),
        *_LINEAR,
    )
    boundaries: tuple[tuple[str, BoundaryKind], ...] = (
        ("embedding", "embedding"),
        ("embedding.positions", "positions"),
        ("layers.*.attention", "block"),
        ("layers.*.attention.slopes", "heads"),
        *((("layers.*.attention.*_norm", "norm"),) if over_all else ()),
        ("layers.*.feed_forward", "block"),
        ("layers.*.feed_forward.experts", "experts"),
        ("head", "head"),
    )
    return ShardingPlan(placements, boundaries, {"head.weight": "embedding.weight"} if config.tie_embeddings else {})


def _factors() -> Iterator[tuple[str, Placement]]:
    """Yields the placements of the low-rank factors beside the weights of linear layers.

    A factor is split as its weight is along the dim that they share. The other dim, the rank, is never split: where the weight is,
    the ranks hold copies of the factor, and each computes a part of its gradient, from its part of the outputs (of A) or of the
    inputs (of B).
    """
    for pattern, weight in _LINEAR:
        outputs = 1 if "expert" in weight.axes else 0
        yield pattern + FIRST, _factor(weight, outputs, "fan_in")
        yield pattern + SECOND, _factor(weight, outputs + 1, "zeros")


def _factor(weight: Placement, rank_dim: int, initial: InitialValues) -> Placement:
    """Returns the placement of the factor that has the rank at `rank_dim`, where `weight` has outputs or inputs."""
    axes = dict(weight.shards)
    shards = tuple((dim, axis) for dim, axis in weight.shards if dim != rank_dim)
    return Placement(shards, partial_over=axes.get(rank_dim), initial=initial)
