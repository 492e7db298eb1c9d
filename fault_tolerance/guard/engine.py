"""What the guard looks at: the gradients and the optimizer state that a rank holds, whatever engine holds them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from bagualu.comm.group import Group


@dataclass(frozen=True)
class StateShard:
    """State of this rank that is updated together, and the working weights that are made from it."""

    name: str
    """For people, e.g. "layers.3.down.weight and 4 more"."""
    tensors: Mapping[str, torch.Tensor]
    """By kind: "weight" (the master weights, or a buffer) first, then the moments and "step" (how many updates), if there are any.
    The state itself, no copy."""
    axis: str
    """The axis whose ranks hold copies of the working weights."""
    group: Group
    """The ranks along it."""
    held_along: Sequence[str]
    """Axes along which all ranks hold the same state."""
    copies: Sequence[torch.Tensor]
    """This rank's copies of working weights: one for each rank of the group if each owns a part, else a single one."""
    partitioned: bool
    """Whether each rank of the group owns a part."""


class GuardedEngine(Protocol):
    before_reduction: Callable[[torch.Tensor], None] | None
    """Called with each tensor of gradients when this rank's part is complete and no other rank's has been added; in the same order
    in every attempt at a step."""

    def reduced_gradients(self) -> Iterator[torch.Tensor]:
        """The gradients that this rank updates its state with, after the reduction."""

    def shards(self) -> Sequence[StateShard]:
        """The same number, in the same order, for as long as this engine lives."""

    def publish(self) -> None:
        """Makes the working weights of all ranks from the master weights. Collective."""
