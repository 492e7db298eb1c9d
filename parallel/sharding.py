"""A model's sharding plan: data that says which dim of which parameter is split over which axis. Free of torch.

Everything that must know how a parameter is laid out reads it here: initialisation, gradient reduction, the gradient norm, the
optimizer's partition, checkpoints. There is no second list.
"""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from bagualu.comm.errors import RecipeError
from bagualu.parallel.boxes import Box
from bagualu.parallel.layout import Layout

BoundaryKind = Literal["block", "embedding", "head", "experts"]


@dataclass(frozen=True)
class Placement:
    """How one parameter lies on the mesh. Axes not named hold copies."""

    shards: tuple[tuple[int, str], ...] = ()
    """(dim, axis) pairs: the dim is cut into equal parts along the axis."""
    partial_over: str | None = None
    """The axis whose ranks hold copies that each see only a part of the gradient, which is the sum over the axis."""

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for _, axis in self.shards)

    @property
    def reduction_axis(self) -> str:
        """The axis of the ranks that hold the same elements and see different samples."""
        return "replica" if "expert" in self.axes else "fold"

    def box(self, name: str, shape: tuple[int, ...], layout: Layout, coordinates: dict[str, int]) -> Box:
        """The part of the global tensor `name` of `shape` that lies at `coordinates`. Raises RecipeError if it does not divide."""
        offset, local = [0] * len(shape), list(shape)
        for dim, axis in self.shards:
            degree = layout.size(axis)
            if shape[dim] % degree:
                raise RecipeError(
                    f"{name} {list(shape)} cannot be split along dim {dim} over {axis} {degree}; "
                    f"give parallel.{axis} a divisor of {shape[dim]}"
                )
            local[dim] = shape[dim] // degree
            offset[dim] = local[dim] * coordinates[axis]
        return Box(tuple(offset), tuple(local))

    def counted(self, layout: Layout, coordinates: dict[str, int]) -> bool:
        """Whether this rank is the one, among the copies along the tensor axis, whose copy counts (norm, checkpoint)."""
        return "tensor" in self.axes or coordinates["tensor"] == 0


@dataclass(frozen=True)
class ShardingPlan:
    """Patterns are shell-style over full names; the first that matches counts, and every parameter must have one."""

    placements: tuple[tuple[str, Placement], ...]
    boundaries: tuple[tuple[str, BoundaryKind], ...] = ()
    """Modules whose activations change layout on the way in or out, by module-name pattern (see tensor.py)."""
    tied: dict[str, str] = field(default_factory=dict)
    """Local name -> the name of the parameter it is a copy of, on another stage or the same one."""

    def global_name(self, name: str) -> str:
        return self.tied.get(name, name)

    def placement(self, name: str) -> Placement:
        """Raises KeyError for a parameter that no pattern covers."""
        for pattern, placement in self.placements:
            if fnmatchcase(name, pattern):
                return placement
        raise KeyError(f"no pattern of the sharding plan covers the parameter {name}")
