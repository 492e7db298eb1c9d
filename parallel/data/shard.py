"""What an optimizer needs to know of the parameters that a rank updates, whichever engine holds them."""

from collections.abc import Hashable, Iterator
from typing import Protocol

import torch

from bagualu.parallel.boxes import Box


class ShardEntry(Protocol):
    """A parameter of which a shard holds a part."""

    @property
    def name(self) -> str:
        """The global name."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape of the global tensor, without padding."""

    @property
    def box(self) -> Box:
        """The part of the global tensor that the ranks of the shard's group hold together, including padding."""


class Shard(Protocol):
    """Parts of parameters, in flat tensors, that this rank updates together."""

    @property
    def treatment(self) -> Hashable:
        """How the optimizer treats the parameters; it alone knows what this means."""

    @property
    def shard_weights(self) -> torch.Tensor:
        """The working weights [n]."""

    @property
    def shard_gradients(self) -> torch.Tensor:
        """The reduced gradients [n], in the dtype of the master weights."""

    @property
    def owned(self) -> bool:
        """Whether this rank's copy of the shard is the one that the gradient norm includes and checkpoints save."""

    def shard_entries(self) -> Iterator[tuple[ShardEntry, int, int, int]]:
        """Yields (entry, first element in the shard, first element in the parameter's flattened box, number of elements) for the
        part of every parameter that lies in the shard."""
