"""A model's sharding plan: data that state which dim of which parameter or buffer is split over which axis.

Initialisation, gradient reduction, the gradient norm, the optimizer's partition and checkpoints all read this plan; there is no
second list.
"""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from bagualu.comm.errors import RecipeError
from bagualu.parallel.boxes import Box
from bagualu.parallel.layout import Layout

BoundaryKind = Literal["block", "embedding", "positions", "heads", "norm", "head", "experts"]
InitialValues = Literal["normal", "residual", "fan_in", "ones", "zeros"]
"""The kind of values with which a parameter or buffer begins a run; residual: normal with a smaller deviation, for matrices that
write into the residual stream; fan_in: normal with a variance of 1 / (3 x number of inputs), that of torch's linear layers."""


@dataclass(frozen=True)
class Placement:
    """How a parameter or a buffer is distributed over the mesh. Ranks along an axis that is not named hold copies."""

    shards: tuple[tuple[int, str], ...] = ()
    """Pairs (tensor dim, mesh axis): the dim is split into equal parts over the ranks along the axis."""
    partial_over: str | None = None
    """The axis whose ranks hold copies, of which each computes only a part of the gradient: the whole gradient is the sum over the
    axis. None: no such axis."""
    initial: InitialValues = "normal"
    rows: int | None = None
    """The number of elements of the first dim that belong to the parameter; those after them are padding, always zero. None: no
    padding."""

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for _, axis in self.shards)

    @property
    def reduction_axis(self) -> str:
        """The axis of the ranks that hold the same elements and process different samples."""
        return "replica" if "expert" in self.axes else "fold"

    def unpadded(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `shape`, that of the padded parameter, without the padding."""
        return shape if self.rows is None else (self.rows, *shape[1:])

    def box(self, name: str, shape: tuple[int, ...], layout: Layout, coordinates: dict[str, int]) -> Box:
        """Returns the box that the rank at `coordinates` holds of the global tensor `name` of (padded) `shape`. Raises RecipeError
        if a dim does not divide."""
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
        """Returns whether the gradient norm and checkpoints include the copy of the rank at `coordinates`: of copies along the
        tensor axis, only the first."""
        return "tensor" in self.axes or coordinates["tensor"] == 0


@dataclass(frozen=True)
class ShardingPlan:
    """Maps names of parameters and buffers to placements. Patterns are shell-style; the first pattern that matches a name applies,
    and every name needs a match."""

    placements: tuple[tuple[str, Placement], ...]
    boundaries: tuple[tuple[str, BoundaryKind], ...] = ()
    """(module-name pattern, kind) of modules whose inputs or outputs change layout (see tensor.py)."""
    tied: dict[str, str] = field(default_factory=dict)
    """Maps the local name of a tied parameter to the global name of the parameter that it is a copy of, on the same stage or on
    another."""

    def global_name(self, name: str) -> str:
        return self.tied.get(name, name)

    def placement(self, name: str) -> Placement:
        """Returns the first placement whose pattern matches `name`. Raises KeyError if no pattern does."""
        for pattern, placement in self.placements:
            if fnmatchcase(name, pattern):
                return placement
        raise KeyError(f"no pattern of the sharding plan covers {name}")
