"""Applies torch's `fully_shard` to a rank's part of a model, over process groups that the run already has.

A unit is a set of modules whose parameters are gathered in one call and reduced in one call: a decoder layer without its experts,
the experts of a layer, the embedding, its norm, the final norm with the head. If embedding and head are one tensor on this rank,
they and the final norm are a unit, which belongs to the model itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from bagualu.comm.group import Group
from bagualu.comm.monitor import Monitor, Phase
from bagualu.parallel.layout import COPIES, SHARD
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.precision import accurate_dtype
from bagualu.parallel.sharding import ShardingPlan
from bagualu.trainer.models.decoder.model import Decoder


class _Communication:
    """What FSDP2 asks of a user's own collective, over a `Group`, so that the monitor knows of it."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Communication):
    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False) -> None:
        self.group.all_gather(output_tensor, input_tensor)


class _Reduce(_Communication):
    """The reduction of a unit's gradients, which have `elements` elements, padding included; None: not always all of them, because
    both ends of the model are on this rank and have backward passes of their own."""

    def __init__(self, group: Group, monitor: Monitor, module: FSDPModule, elements: int | None) -> None:
        super().__init__(group)
        self.monitor, self.module, self.elements = monitor, module, elements
        self.before: Callable[[torch.Tensor], None] | None = None
        """Called with the gradients before other ranks' are added; None: no call."""
        self._left = 0

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        assert op == dist.ReduceOp.SUM, op
        if self.elements not in (None, input_tensor.numel()):
            raise RuntimeError("a parameter has no gradient on this rank: FSDP2 would add to it those of other parameters")
        self.monitor.at(Phase.BUCKET)
        if self.before is not None:
            self.before(input_tensor)
        self.group.reduce_scatter(output_tensor, input_tensor)
        self.expect(self._left - 1)

    def expect(self, reductions: int) -> None:
        """Prepares for `reductions` reductions in a step. Only their sum is also summed over other copies of the weights."""
        self._left = reductions
        self.module.set_requires_all_reduce(reductions <= 1 or self.elements is None, recurse=False)


@dataclass(frozen=True)
class Unit:
    module: FSDPModule
    """One of the unit's modules; FSDP2's settings of any of them are those of the unit."""
    names: list[str]
    """The names of its parameters in the model."""
    reduce: _Reduce


def shard_group(mesh: Mesh, axis: str) -> Group:
    """Returns the ranks that hold one copy together of parameters whose gradients are summed over `axis`, fold or replica."""
    return mesh.group(axis + SHARD if mesh.layout.shard else axis)


Materialise = Callable[[str, nn.Parameter], None]
"""Gives a parameter, whose name in the model is given too, memory and its values."""


def fully_sharded(model: Decoder, plan: ShardingPlan, mesh: Mesh, dtype: torch.dtype, materialise: Materialise) -> list[Unit]:
    """Divides the model's parameters among the ranks that hold one copy of them together, and returns the units. Modules then
    compute in `dtype`; gradients are summed, not averaged, in at least float32. A parameter that a rank does not share stays as it
    is. Each parameter is materialised just before it is divided, so that a rank never holds more than one whole unit.

    With one stage, a unit is gathered for each pass and freed after it, except the head, whose backward pass follows its forward
    pass. With several, the schedule comes back to a stage while it still holds other micro-batches: a unit is gathered by the
    first pass of a step, and stays until `reshard`. In both cases gradients are reduced after every backward pass, so that a rank
    holds whole gradients of one unit only.
    """
    return _Sharding(model, plan, mesh, dtype, materialise).units()


class _Sharding:
    def __init__(self, model: Decoder, plan: ShardingPlan, mesh: Mesh, dtype: torch.dtype, materialise: Materialise) -> None:
        self.model, self.plan, self.mesh, self.materialise = model, plan, mesh, materialise
        self.policy = MixedPrecisionPolicy(dtype, accurate_dtype(dtype), cast_forward_inputs=False)
        self.meshes = {axis: _device_mesh(mesh, axis) for axis in ("fold", "replica") if shard_group(mesh, axis).size > 1}
        alone = {name: parameter for name, parameter in model.named_parameters() if self._axis(name) not in self.meshes}
        for name, parameter in alone.items():
            materialise(name, parameter)
        self.alone = set(alone.values())

    def _axis(self, name: str) -> str:
        return self.plan.placement(self.plan.global_name(name)).reduction_axis

    def units(self) -> list[Unit]:
        if not self.meshes:
            return []
        model, frees = self.model, self.mesh.placement.stages == 1
        units = [self._unit([experts], "replica", frees) for experts in self._experts()]
        units += [self._unit([layer], "fold", frees) for layer in model.layers.values()]
        if model.embedding_norm is not None:
            units.append(self._unit([model.embedding_norm], "fold", frees))
        embedding, norm, head = model.embedding, model.norm, model.head
        if embedding is None or head is None or embedding.weight is not head.weight:
            if embedding is not None:
                units.append(self._unit([embedding], "fold", frees))
                units[-1].module.set_unshard_in_backward(False)  # its backward pass does not read the weight
            if norm is not None and head is not None:
                units.append(self._unit([norm, head], "fold", False))
        units.append(self._unit([model], "fold", False))
        root = units[-1].module
        root.set_reduce_scatter_unused_params(self.mesh.placement.chunks == 1)  # else a pass would reduce other stages' too
        root.set_reshard_after_backward(frees)
        return [unit for unit in units if unit.names]

    def _experts(self) -> list[nn.Module]:
        """Returns the modules with parameters that fewer ranks hold than those of their layer, and that are to be sharded."""
        modules = [(f"{name}.", module) for name, module in self.model.named_modules() if name]
        parameters = [(module, prefix + key) for prefix, module in modules for key, _ in module.named_parameters(recurse=False)]
        found = dict.fromkeys(module for module, name in parameters if self._axis(name) == "replica")
        return list(found) if "replica" in self.meshes else []

    def _unit(self, modules: list[nn.Module], axis: str, frees: bool) -> Unit:
        group, inside = shard_group(self.mesh, axis), {p for module in modules for p in module.parameters()} - self.alone
        parameters = {n: p for n, p in self.model.named_parameters() if p in inside and not isinstance(p, DTensor)}
        for name, parameter in parameters.items():
            self.materialise(name, parameter)
        several = modules == [self.model] and self.mesh.placement.stages > 1
        elements = sum(_padded_elements(p, group.size) for p in parameters.values() if p.requires_grad)
        module, *_ = fully_shard(
            modules,
            mesh=self.meshes[axis],
            reshard_after_forward=frees,
            shard_placement_fn=lambda parameter: Shard(split_dim(parameter.shape, group.size)),
            mp_policy=self.policy,
            ignored_params=self.alone,
        )
        reduce = _Reduce(group, self.mesh.monitor, module, None if several else elements)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # otherwise the sum of float32 is an operation that Gloo does not have
        module.set_custom_all_gather(_Gather(group))  # type: ignore[arg-type]  # torch does not export the interface
        module.set_custom_reduce_scatter(reduce)  # type: ignore[arg-type]
        return Unit(module, list(parameters), reduce)


def split_dim(shape: Sequence[int], size: int) -> int:
    """Returns the dim along which `size` ranks divide a parameter: 0, or 1 for stacked matrices of which there are not equally many
    for each rank."""
    return int(len(shape) == 3 and shape[0] % size > 0 and shape[1] % size == 0)


def _padded_elements(parameter: nn.Parameter, size: int) -> int:
    """Returns the elements of a parameter's gradient when its rows are padded to a multiple of `size`, if it is divided by rows."""
    rows = parameter.shape[0]
    return parameter.numel() if split_dim(parameter.shape, size) else -(-rows // size) * size * (parameter.numel() // rows)


def _device_mesh(mesh: Mesh, axis: str) -> DeviceMesh:
    """Returns torch's mesh of the ranks along `axis`: with several copies of the weights, copies x ranks that share a copy."""
    device, shard = mesh.group("world").device.type, shard_group(mesh, axis)
    if not mesh.layout.shard or mesh.group(axis + COPIES).size == 1:
        return DeviceMesh.from_group(shard.process_group, device)
    groups = [mesh.group(axis + COPIES).process_group, shard.process_group]
    ranks = torch.tensor(mesh.group(axis).ranks).view(-1, shard.size)
    return DeviceMesh.from_group(groups, device, ranks, mesh_dim_names=("copies", "shard"))
