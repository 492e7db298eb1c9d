"""What an optimizer needs to know of the parameters that a rank updates, whichever engine holds them."""

from collections.abc import Hashable, Iterator
from typing import Protocol

import torch

from bagualu.parallel.boxes import Box, TensorPiece, flat_range_to_boxes

_NORM_PIECE = 2**10


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
        """The box of the global tensor, including padding, of whose flattened elements the shard holds a range."""


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
        """The reduced gradients [n], in the dtype of the master weights. The optimizer may overwrite them, and until the end
        of its update this is the same memory."""

    @property
    def owned(self) -> bool:
        """Whether this rank's copy of the shard is the one that the gradient norm includes and checkpoints save."""

    def shard_entries(self) -> Iterator[tuple[ShardEntry, int, int, int]]:
        """Yields (entry, first element in the shard, first element in the parameter's flattened box, number of elements) for the
        part of every parameter that lies in the shard."""


def shard_pieces(kind: str, part: Shard, tensor: torch.Tensor) -> Iterator[TensorPiece]:
    """Yields every box of a global tensor `kind`/parameter that the shard `tensor` holds, as a view of `tensor`, without
    padding."""
    for entry, in_shard, in_parameter, numel in part.shard_entries():
        for flat, box in flat_range_to_boxes(entry.box.shape, in_parameter, in_parameter + numel):
            start = in_shard + flat - in_parameter
            view, held = tensor[start : start + box.elements].view(box.shape), box.shift(entry.box.offset)
            if own := held.within(entry.global_shape):
                yield TensorPiece(f"{kind}/{entry.name}", entry.global_shape, own.offset, view[own.slices(held.offset)])


def norm_squared(gradients: torch.Tensor) -> torch.Tensor:
    """Returns the squared norm of `gradients` [n], a float64 scalar.

    It sums float32 norms of short pieces in float64. So it loses no digits and does not depend on the number of threads.
    """
    whole = gradients.numel() // _NORM_PIECE * _NORM_PIECE
    pieces = torch.linalg.vector_norm(gradients[:whole].view(-1, _NORM_PIECE), dim=1)
    rest = torch.linalg.vector_norm(gradients[whole:])
    squared: torch.Tensor = pieces.double().square().sum() + rest.double().square()
    return squared
