"""Tensors of a model that no optimizer updates but that belong to the state of a run: buffers, such as the biases of a router, and
frozen parameters."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bagualu.comm.group import Group
from bagualu.parallel.boxes import TensorPiece
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.precision import accurate_dtype
from bagualu.parallel.sharding import Placement, ShardingPlan


@dataclass(frozen=True)
class Untrained:
    """A buffer or frozen parameter on this rank, after `parallelize`."""

    kind: str
    """The first part of its name in checkpoints: "buffer", or "weight" as for a parameter that is trained."""
    name: str
    tensor: torch.Tensor
    placement: Placement
    group: Group
    """The ranks that hold the same elements and process different samples."""
    held_along: tuple[str, ...]
    """Mesh axes along which all ranks hold the same elements."""
    counted: bool
    """Whether checkpoints hold this rank's elements rather than a copy of them on another stage or tensor rank."""
    owned: bool
    """Whether this rank's copy is the one that checkpoints hold."""

    @property
    def saved_dtype(self) -> torch.dtype:
        """The dtype in checkpoints: at least float32, as that of master weights."""
        return accurate_dtype(self.tensor.dtype)

    def piece(self, tensor: torch.Tensor) -> TensorPiece | None:
        """Returns this rank's box of the global tensor, without padding, as a view of `tensor`, which has the shape of this rank's
        part; None if all of it is padding."""
        whole, box = self.tensor.global_shape, self.tensor.box  # type: ignore[attr-defined]
        own = box.within(whole)
        return own and TensorPiece(f"{self.kind}/{self.name}", whole, own.offset, tensor[own.slices(box.offset)])


def untrained_of(model: torch.nn.Module, plan: ShardingPlan, mesh: Mesh, frozen: bool = True) -> Iterator[Untrained]:
    """Yields the buffers and, with `frozen`, the frozen parameters of this rank's part of a model, in the order of its modules."""
    parameters = [("weight", *named) for named in model.named_parameters() if frozen and not named[1].requires_grad]
    for kind, local_name, tensor in [("buffer", *named) for named in model.named_buffers()] + parameters:
        name = plan.global_name(local_name)
        placement = plan.placement(name)
        group = mesh.group(placement.reduction_axis)
        tied = name in plan.tied.values() and "ends" in mesh.groups and mesh.group("ends").size > 1
        counted = placement.counted(mesh.layout, mesh.coordinates) and not (tied and local_name != name)
        held_along = (placement.reduction_axis, *([] if "tensor" in placement.axes else ["tensor"]), *(["ends"] if tied else []))
        yield Untrained(kind, name, tensor, placement, group, held_along, counted, group.rank == 0 and counted)
