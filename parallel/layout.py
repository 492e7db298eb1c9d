"""Rank arithmetic: the coordinate of a rank on each axis, and the groups of ranks that differ on a single axis.

The order of axes, slowest first, is pipeline, data, context, tensor. Ranks of a tensor group are neighbours, on the fastest links;
stages are farthest apart because they exchange least. Expert ranks are taken from the data x context ranks ("fold"), and the expert
coordinate varies fastest within them. So the all-to-all of every layer stays on near ranks, and only the gradient reduction, once a
step, crosses far ranks (BaGuaLu's MoDa layout, PPoPP'22, section 4).
"""

from dataclasses import dataclass

SHARD, COPIES = "_shard", "_copies"
"""Endings of the names of the two tiers into which Layout.shard divides an axis (see Layout.peers)."""


@dataclass(frozen=True)
class Layout:
    """The degree of every axis. `expert` and `shard` divide data * context and add no ranks of their own."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    shard: int | None = None
    """The number of neighbours in the fold that hold one copy of the dense weights together; None: all ranks of the fold."""

    @property
    def world(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def fold(self) -> int:
        """The number of ranks that hold the same dense parameters: data x context."""
        return self.data * self.context

    def coordinates(self, rank: int) -> dict[str, int]:
        """Returns the coordinate of `rank` on every axis, including the derived axes fold, expert, replica and world."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        fold = data * self.context + context
        replica, expert = divmod(fold, self.expert)
        return {
            "pipeline": pipeline, "data": data, "context": context, "tensor": tensor,
            "fold": fold, "expert": expert, "replica": replica, "world": rank,
        }  # fmt: skip

    def size(self, axis: str) -> int:
        """Returns the number of ranks along `axis`, which may be a derived axis (see `peers`)."""
        if axis == "replica":
            return self.fold // self.expert
        if axis.endswith(SHARD):
            whole = self.size(axis.removesuffix(SHARD))
            return max(1, whole * (self.shard or self.fold) // self.fold)
        if axis.endswith(COPIES):
            return self.size(axis.removesuffix(COPIES)) // self.size(axis.removesuffix(COPIES) + SHARD)
        return int(getattr(self, axis))

    def rank(self, pipeline: int, fold: int, tensor: int) -> int:
        """Returns the global rank at these coordinates; `fold` is that on the derived axis data x context."""
        return (pipeline * self.fold + fold) * self.tensor + tensor

    def peers(self, axis: str, rank: int) -> range:
        """Returns `rank` and the ranks that differ from it on `axis` alone, in the order of their coordinates.

        Axes: pipeline, data, context, tensor, expert (ranks with the other experts), replica (ranks with the same experts), fold
        (ranks with the same dense parameters), world; and for fold and replica each, axis + SHARD (the ranks that hold one copy of
        the weights together) and axis + COPIES (the ranks that hold the same part of different copies).
        """
        if axis == "world":
            return range(self.world)
        at = self.coordinates(rank)
        if axis.endswith((SHARD, COPIES)):
            whole = axis.removesuffix(SHARD).removesuffix(COPIES)
            ranks, together = self.peers(whole, rank), self.size(whole + SHARD)
            first, place = divmod(at[whole], together)
            return ranks[first * together :][:together] if axis.endswith(SHARD) else ranks[place::together]
        apart = {
            "pipeline": self.fold * self.tensor,
            "data": self.context * self.tensor,
            "replica": self.expert * self.tensor,
            "tensor": 1,
        }.get(axis, self.tensor)
        first = rank - at[axis] * apart
        return range(first, first + self.size(axis) * apart, apart)

    def __str__(self) -> str:
        parts = [f"{axis} {self.size(axis)}" for axis in ("data", "tensor", "pipeline", "expert", "context")]
        return " x ".join(part for part in parts if not part.endswith(" 1")) or "one rank"


@dataclass(frozen=True)
class StagePlacement:
    """The assignment of stages to pipeline ranks: `chunks` stages on each of `ranks` ranks.

    Consecutive stages are on consecutive ranks and start again at rank 0 after the last rank. With `v_shaped`, every second pass
    over the ranks runs backwards, so with two chunks the last stage is on the same rank as the first.
    """

    ranks: int
    chunks: int = 1
    v_shaped: bool = False

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    def rank_of(self, stage: int) -> int:
        """Returns the pipeline rank that holds `stage`."""
        chunk, index = divmod(stage, self.ranks)
        return self.ranks - 1 - index if self.v_shaped and chunk % 2 else index

    def stages_of(self, rank: int) -> list[int]:
        """Returns the rank's stages in the order of the model; the index into this list is the chunk."""
        return [stage for stage in range(self.stages) if self.rank_of(stage) == rank]

    def neighbour(self, stage: int, step: int) -> int | None:
        """Returns the rank of the next (`step` 1) or previous (-1) stage; None if there is none or `stage`'s own rank holds it."""
        other = stage + step
        if not 0 <= other < self.stages or self.rank_of(other) == self.rank_of(stage):
            return None
        return self.rank_of(other)
