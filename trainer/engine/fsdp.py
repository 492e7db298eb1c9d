"""An engine on torch's FSDP2 (`torch.distributed.fsdp.fully_shard`): ZeRO-3, where data ranks divide weights among themselves too.

Tensor and expert parallelism are the project's own: their parameters are plain tensors, which FSDP2 divides further among the ranks
that hold the same. The optimizer updates this rank's part of each parameter, in at least float32, which is also what FSDP2 gathers
from. So between steps no rank holds weights of others.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor

from bagualu.fault_tolerance.guard.engine import StateShard
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.boxes import Box
from bagualu.parallel.data.bucket import BucketKind, kind_of
from bagualu.parallel.layout import COPIES
from bagualu.parallel.memory_kinds import COMMUNICATION
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.parallelize import Fill, box_values
from bagualu.parallel.precision import accurate_dtype
from bagualu.parallel.sharding import ShardingPlan
from bagualu.parallel.untrained import Untrained, untrained_of
from bagualu.trainer.engine.fsdp_units import Unit, fully_sharded, shard_group, split_dim
from bagualu.trainer.engine.local_model import local_model, operators_of
from bagualu.trainer.engine.sharded import ShardedEngine, untrained_shard
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.optim.sharded import ShardedOptimizer
from bagualu.trainer.recipe.config import Recipe


@dataclass
class ParameterShard:
    """The part of a parameter that this rank updates, which is all of it if no other rank shares it: a `Shard`
    (parallel/data/shard.py) with itself as its only entry."""

    name: str
    global_shape: tuple[int, ...]
    box: Box
    """The part of the global tensor, including padding."""
    parameter: torch.nn.Parameter
    kind: BucketKind
    held_along: tuple[str, ...]
    """Mesh axes along which all ranks hold the same part."""
    sums: tuple[str, ...]
    """Mesh axes over which the gradient is summed after FSDP2 has reduced it."""
    owned: bool
    shard_weights: torch.Tensor
    shard_gradients: torch.Tensor

    @property
    def treatment(self) -> Hashable:
        return self.kind.treatment

    @property
    def whole(self) -> bool:
        """Whether FSDP2 does not divide the parameter."""
        return not isinstance(self.parameter, DTensor)

    def shard_entries(self) -> Iterator[tuple["ParameterShard", int, int, int]]:
        if self.box.elements:
            yield self, 0, 0, self.box.elements

    def take_gradient(self) -> None:
        """Makes the gradient of this step's backward passes, zero without any, `shard_gradients`."""
        gradient = self.parameter.grad
        dtype = self.shard_gradients.dtype
        self.shard_gradients = torch.zeros_like(self.shard_weights, dtype=dtype) if gradient is None else _flat(gradient)

    def drop_gradient(self) -> None:
        self.parameter.grad = None
        self.shard_gradients = self.shard_gradients[:0].clone()


class FsdpEngine(ShardedEngine):
    """The `Engine` of protocol.py, over FSDP2."""

    def __init__(
        self,
        model: Decoder,
        units: list[Unit],
        parts: list[ParameterShard],
        untrained: list[Untrained],
        optimizer: ShardedOptimizer,
        mesh: Mesh,
        dtype: torch.dtype,
    ) -> None:
        """`dtype`: that of the working weights."""
        super().__init__(model, parts, [], untrained, optimizer, mesh.group("world"))
        self.units, self.parts, self._mesh, self._dtype = units, parts, mesh, dtype
        self._leaves: dict[str, torch.Tensor] = dict(model.named_parameters())
        self._before_reduction: Callable[[torch.Tensor], None] | None = None

    @property
    def before_reduction(self) -> Callable[[torch.Tensor], None] | None:
        return self._before_reduction

    @before_reduction.setter
    def before_reduction(self, call: Callable[[torch.Tensor], None] | None) -> None:
        self._before_reduction = call
        for unit in self.units:
            unit.reduce.before = call

    def leaves(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._leaves.items()

    def held(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().held()
        yield from ((COMMUNICATION, self._leaves[name]) for unit in self.units for name in unit.names)  # without memory at present

    def working_weights(self) -> Iterator[Sequence[torch.Tensor]]:
        return ((part.shard_weights,) if part.shard_weights.dtype == self._dtype else () for part in self.parts)

    def begin(self, micro_batches: int) -> None:
        for part in self.parts:
            part.drop_gradient()
        for unit in self.units:
            unit.reduce.expect(micro_batches)

    def putting_off(self) -> AbstractContextManager[list[Callable[[], None]]]:
        return nullcontext([])  # recipes with a schedule that splits backward passes are refused

    @torch.no_grad()
    def finish(self) -> None:
        for part in self.parts:
            part.take_gradient()
            if part.whole and self.before_reduction is not None:
                self.before_reduction(part.shard_gradients)
        for axis in sorted({axis for part in self.parts for axis in part.sums}):  # in the same order on every rank
            summed = [part.shard_gradients for part in self.parts if axis in part.sums]
            works = [self._mesh.group(axis).all_reduce(gradients, asynchronous=True) for gradients in summed]
            for work in works:
                work.wait()
        self._free()

    def step(self, lr: float, gradient_factor: float) -> None:
        super().step(lr, gradient_factor)
        self._free()

    def publish(self) -> None:
        super().publish()
        self._free()

    def _free(self) -> None:
        """Frees weights that were gathered before an update, e.g. by a validation, so that the next pass gathers new ones."""
        for unit in self.units:
            unit.module.reshard()

    def shards(self) -> list[StateShard]:
        trained = [self._state_shard(*both) for both in zip(self.parts, self.optimizer.shards(), strict=True)]
        return trained + [untrained_shard(part) for part in self.untrained]

    def _state_shard(self, part: ParameterShard, tensors: dict[str, torch.Tensor]) -> StateShard:
        axis, copies = part.kind.reduction_axis, (part.shard_weights,)
        return StateShard(part.name, tensors, axis, self._mesh.group(axis), part.held_along, copies)

    def open(self) -> None:
        """Gathers every unit once, to learn the leaves of autograd's graph. Their gradients are then in at least float32, as the
        kernels compute them."""
        super().open()
        for unit in self.units:
            unit.module.unshard()
            for name in unit.names:
                self._leaves[name] = _accumulating(self.model.get_parameter(name))
            unit.module.reshard()

    def close(self) -> None:
        """Frees the weights, because FSDP2 keeps modules in reference cycles. Python's garbage collector frees those that were read
        as NumPy arrays, e.g. for a checkpoint: torch does not let them go before."""
        self._free()
        for part in self.parts:
            part.drop_gradient()
            if (storage := part.shard_weights.untyped_storage()).resizable():
                storage.resize_(0)


def hold(recipe: Recipe, mesh: Mesh, split: Split, fill: Fill) -> FsdpEngine:
    """Builds an engine that holds this rank's stages of `split`, with weights and buffers from `fill`.

    Raises RecipeError if the communication backend has no torch process groups."""
    device, dtype = mesh.group("world").device, getattr(torch, recipe.train.stored_dtype)
    parameters = parameter_shapes(recipe.model)

    def later(name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        """Returns a tensor without memory of its own for a parameter, and the values of a buffer."""
        nothing = torch.zeros((), dtype=accurate_dtype(dtype), device=device)
        return nothing.expand(box.shape) if name in parameters else fill(name, shape, box)

    model, plan = local_model(recipe, mesh, split, later, accurate_dtype(dtype))
    boxes = {name: (parameter.global_shape, parameter.box) for name, parameter in model.named_parameters()}  # type: ignore[attr-defined]

    def materialise(local_name: str, parameter: torch.nn.Parameter) -> None:
        """Weights are rounded to `dtype`, in which the model computes. Those that FSDP2 divides and the optimizer updates are then
        kept in at least float32: they are the master weights."""
        name = plan.global_name(local_name)
        values = box_values(name, *boxes[local_name], fill).to(device, dtype)
        divided = shard_group(mesh, plan.placement(name).reduction_axis).size > 1
        parameter.data = values.to(accurate_dtype(dtype)) if divided and parameter.requires_grad else values
        if not divided:
            _accumulating(parameter)

    units = fully_sharded(model, plan, mesh, dtype, materialise)
    for name, parameter in model.named_parameters():
        parameter.global_shape, parameter.box = boxes[name]  # type: ignore[attr-defined]
    parts = [_part(*named, recipe, plan, mesh) for named in model.named_parameters() if named[1].requires_grad]
    untrained = [_divided(part, mesh) if isinstance(part.tensor, DTensor) else part for part in untrained_of(model, plan, mesh)]
    optimizer = ShardedOptimizer(parts, recipe.optim, device, recipe.run.seed, operators_of(recipe, device).update)
    return FsdpEngine(model, units, parts, untrained, optimizer, mesh, dtype)


def _accumulating(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Lets autograd sum gradients of `parameter` in at least float32, instead of in its own dtype."""
    if parameter.requires_grad:
        parameter.grad_dtype = accurate_dtype(parameter.dtype)
    return parameter


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's elements of `tensor` [n], not a copy."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().reshape(-1)


def _local_box(tensor: torch.Tensor, box: Box, mesh: Mesh, axis: str) -> Box:
    """Returns this rank's part of the global tensor, given `box`, that of all ranks that share a copy of `tensor`."""
    if not isinstance(tensor, DTensor):
        return box
    group = shard_group(mesh, axis)
    dim, shape = split_dim(box.shape, group.size), tuple(tensor.to_local().shape)
    first = min(group.rank * -(-box.shape[dim] // group.size), box.shape[dim])
    assert shape[dim] == min(-(-box.shape[dim] // group.size), box.shape[dim] - first), (box, shape)
    return Box((*box.offset[:dim], box.offset[dim] + first, *box.offset[dim + 1 :]), shape)


def _copies(mesh: Mesh, axis: str) -> list[str]:
    """Returns the axis along which other ranks hold the same part of another copy of the weights; [] if there is one copy."""
    return [axis + COPIES] if mesh.layout.shard and mesh.group(axis + COPIES).size > 1 else []


@torch.no_grad()
def _part(local_name: str, parameter: torch.nn.Parameter, recipe: Recipe, plan: ShardingPlan, mesh: Mesh) -> ParameterShard:
    name, shape, box = plan.global_name(local_name), parameter.global_shape, parameter.box  # type: ignore[attr-defined]
    kind = kind_of(name, local_name, recipe.optim.treatment(name, parameter.ndim), plan, mesh)
    copies, weights = _copies(mesh, kind.reduction_axis), _flat(parameter)
    partial = [kind.partial_over] if kind.partial_over else []
    ends = ["ends"] if kind.tied else []
    return ParameterShard(
        name=name,
        global_shape=shape,
        box=_local_box(parameter, box, mesh, kind.reduction_axis),
        parameter=parameter,
        kind=kind,
        held_along=(*copies, *([kind.copied_over] if kind.copied_over else []), *ends),
        sums=(*ends, *partial, *([] if isinstance(parameter, DTensor) else copies)),
        owned=kind.counted and all(mesh.group(axis).rank == 0 for axis in copies),
        shard_weights=weights,
        shard_gradients=weights.new_empty(0, dtype=accurate_dtype(weights.dtype)),
    )


@torch.no_grad()
def _divided(part: Untrained, mesh: Mesh) -> Untrained:
    """Returns this rank's part of a frozen parameter that FSDP2 divides."""
    axis, whole = part.placement.reduction_axis, part.tensor
    assert isinstance(whole, DTensor)
    local = whole.to_local().detach()
    local.global_shape, local.box = whole.global_shape, _local_box(whole, whole.box, mesh, axis)  # type: ignore[attr-defined]
    copies = _copies(mesh, axis)
    held_along = (*copies, *part.held_along[1:])
    owned = part.counted and all(mesh.group(name).rank == 0 for name in copies)
    return replace(part, tensor=local, held_along=held_along, owned=owned)
