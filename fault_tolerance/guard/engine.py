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
    "step" (the number of updates). They are not copies."""
    axis: str
    """The mesh axis along which ranks hold copies of the working weights."""
    group: Group
    """The ranks along `axis`."""
    held_along: Sequence[str]
    """Mesh axes along which all ranks hold the same state."""
    copies: Sequence[torch.Tensor]
    """This rank's copies of working weights: one tensor for each rank of the group if each owns a part, else a single tensor."""
    partitioned: bool
    """Whether each rank of the group owns a part of the working weights."""


class GuardedEngine(Protocol):
    before_reduction: Callable[[torch.Tensor], None] | None
    """Called with each tensor of gradients when this rank's contribution is complete and before others are added to it. The order
    is the same in every attempt at a step. None: no call."""

    def reduced_gradients(self) -> Iterator[torch.Tensor]:
        """Yields the reduced gradients with which this rank updates its state."""

    def shards(self) -> Sequence[StateShard]:
        """Returns this rank's state. The number and the order of the shards never change."""

    def publish(self) -> None:
        """Overwrites the working weights of all ranks with those made from the master weights. Collective."""
