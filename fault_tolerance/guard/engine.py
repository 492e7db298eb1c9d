"""The interface through which the guard reads and repairs a rank's gradients and optimizer state, the same for every engine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from bagualu.comm.group import Group


@dataclass(frozen=True)
class StateShard:
    """A part of this rank's optimizer state that is updated together, and the working weights that are made from it."""

    name: str
    """Description for messages, e.g. "layers.3.down.weight and 4 more"."""
    tensors: Mapping[str, torch.Tensor]
    """The tensors of the state by kind: first "weight" (the master weights, or a buffer), then, if there are any, the moments and
    "step" (the number of updates). They are the state itself, not copies of it."""
    axis: str
    """The mesh axis along which ranks hold copies of the working weights."""
    group: Group
    """The ranks along `axis`."""
    held_along: Sequence[str]
    """Mesh axes along which all ranks hold the same optimizer state as this shard; empty if no other rank holds it."""
    copies: Sequence[torch.Tensor]
    """This rank's copies of working weights: one tensor for each rank of the group if each owns a part and this rank holds all
    parts, else the single tensor that is made from this shard."""


class GuardedEngine(Protocol):
    before_reduction: Callable[[torch.Tensor], None] | None
    """Called with each flat tensor of gradients of the weights when this rank's contribution is complete and before other ranks'
    are added. The order of the calls is the same in every attempt at a step. None: no call."""

    def reduced_gradients(self) -> Iterator[torch.Tensor]:
        """Yields the gradients, reduced over all ranks, with which this rank updates its part of the optimizer state."""

    def shards(self) -> Sequence[StateShard]:
        """Returns the shards of this rank's optimizer state. Their number and order never change."""

    def publish(self) -> None:
        """Overwrites the working weights of all ranks with those made from the master weights. Collective."""
