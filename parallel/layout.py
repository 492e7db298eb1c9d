"""Rank arithmetic, in one place and free of torch: which coordinate a rank has on each axis, who shares it.

The order of axes, slowest first, is pipeline, data, context, tensor: ranks of one tensor group are neighbours, on the
fastest links; stages lie farthest apart because they exchange least. Expert ranks are drawn from the data x context ranks
("fold"), the expert coordinate running fastest within them, so the all-to-all of every layer stays on near ranks and only
the once-a-step gradient reduction crosses far ones (BaGuaLu's MoDa layout, PPoPP'22, section 4).
"""

from dataclasses import dataclass

AXES = ("pipeline", "data", "context", "tensor")


@dataclass(frozen=True)
class Layout:
    """The degree of every axis. `expert` divides data * context; it adds no ranks of its own."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def world(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def fold(self) -> int:
        """Ranks that hold the same dense parameters: data x context."""
        return self.data * self.context

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of `rank` on every axis, the derived ones (fold, expert, replica) included."""
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
        if axis == "replica":
            return self.fold // self.expert
        return int(getattr(self, axis))

    def rank(self, pipeline: int, fold: int, tensor: int) -> int:
        """The rank at these coordinates."""
        return (pipeline * self.fold + fold) * self.tensor + tensor

    def peers(self, axis: str, rank: int) -> tuple[int, ...]:
        """Ranks that differ from `rank` on `axis` alone, in order of their coordinate; `rank` is among them.

        Axes: pipeline, data, context, tensor, expert (holders of the other experts), replica (holders of the same
        experts), fold (holders of the same dense parameters), world.
        """
        at = self.coordinates(rank)
        pipeline, fold, tensor = at["pipeline"], at["fold"], at["tensor"]
        if axis == "world":
            return tuple(range(self.world))
        if axis == "pipeline":
            return tuple(self.rank(stage, fold, tensor) for stage in range(self.pipeline))
        if axis == "tensor":
            return tuple(self.rank(pipeline, fold, t) for t in range(self.tensor))
        folds = {
            "fold": range(self.fold),
            "data": range(at["context"], self.fold, self.context),
            "context": range(at["data"] * self.context, (at["data"] + 1) * self.context),
            "expert": range(at["replica"] * self.expert, (at["replica"] + 1) * self.expert),
            "replica": range(at["expert"], self.fold, self.expert),
        }[axis]
        return tuple(self.rank(pipeline, f, tensor) for f in folds)

    def __str__(self) -> str:
        parts = [f"{axis} {self.size(axis)}" for axis in ("data", "tensor", "pipeline", "expert", "context")]
        return " x ".join(part for part in parts if not part.endswith(" 1")) or "one rank"
