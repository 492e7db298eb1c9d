"""A model's buffers: tensors that are not trained but belong to the state of a run, such as the biases of a router."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bagualu.comm.group import Group
from bagualu.parallel.boxes import TensorPiece
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.sharding import Placement, ShardingPlan


@dataclass(frozen=True)
class Buffer:
    """A buffer on this rank, after `parallelize`."""

    name: str
    tensor: torch.Tensor
    placement: Placement
    group: Group
    """The ranks that hold the same elements and process different samples."""
    owned: bool
    """Whether checkpoints store this rank's copy, of all ranks that hold the same elements."""

    def piece(self, tensor: torch.Tensor) -> TensorPiece:
        """Returns this rank's box of the global tensor, whose values are in `tensor` (of the shape of `self.tensor`) or are to be
        filled in there."""
        shape, box = self.tensor.global_shape, self.tensor.box  # type: ignore[attr-defined]
        return TensorPiece(f"buffer/{self.name}", shape, box.offset, tensor)


def buffers_of(model: torch.nn.Module, plan: ShardingPlan, mesh: Mesh) -> list[Buffer]:
    """Returns the buffers of this rank's part of a model, in the order of its modules."""
    return list(_buffers_of(model, plan, mesh))


def _buffers_of(model: torch.nn.Module, plan: ShardingPlan, mesh: Mesh) -> Iterator[Buffer]:
    for name, tensor in model.named_buffers():
        placement = plan.placement(name)
        group = mesh.group(placement.reduction_axis)
        owned = group.rank == 0 and placement.counted(mesh.layout, mesh.coordinates)
        yield Buffer(name, tensor, placement, group, owned)
