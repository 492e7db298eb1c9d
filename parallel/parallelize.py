"""Distributes a model over the mesh. A single function shows the order of the steps."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from bagualu.parallel.boxes import Box
from bagualu.parallel.expert import ExpertParallel
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.precision import accurate_dtype
from bagualu.parallel.sharding import ShardingPlan
from bagualu.parallel.tensor import wrap_block
from bagualu.parallel.vocabulary import sharded_embedding

Fill = Callable[[str, tuple[int, ...], Box], torch.Tensor]
"""Called with (global name, global shape, box), returns the values of the box, which must depend on nothing else."""


def parallelize(
    model: nn.Module,
    plan: ShardingPlan,
    mesh: Mesh,
    sequence: bool,
    dtype: torch.dtype,
    fill: Fill,
    units: Sequence[nn.Module] = (),
    take: Callable[[nn.Module], None] = lambda unit: None,
) -> None:
    """Replaces a model on the meta device, in its global shapes, by this rank's part of it, in place.

    1. Every parameter becomes this rank's box of the global tensor, filled by `fill`, with attributes `global_shape`, without
       padding, and `box`, which may extend beyond it. So does every buffer, in at least float32. `units` are modules that together
       hold all parameters and buffers, by default the model; `take` is called with each as soon as it is filled, and may free what
       this rank need not hold before the next is filled.
    2. Modules that match the plan's boundaries get the communication of the tensor and expert axes, or learn which heads or which
       slice of the sequence are this rank's. A norm whose width is split gets the group that holds its parts.
    """
    device = mesh.group("world").device
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, torch.Tensor] = {}  # a tied parameter is a single parameter with two names
    for unit in units or [model]:
        for module in unit.modules():
            _materialise(names[module], module, made, plan, mesh, dtype, device, fill)
        take(unit)
    for name, module in model.named_modules():
        for pattern, kind in plan.boundaries:
            if fnmatchcase(name, pattern):
                _BOUNDARIES[kind](module, mesh, sequence)


def _materialise(
    name: str,
    module: nn.Module,
    made: dict[int, torch.Tensor],
    plan: ShardingPlan,
    mesh: Mesh,
    dtype: torch.dtype,
    device: torch.device,
    fill: Fill,
) -> None:
    """Fills the own parameters and buffers of the module `name`. `made` maps the id of a tensor on the meta device to what has
    replaced it."""
    for key, meta in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if id(meta) not in made:
            global_name = plan.global_name(f"{name}.{key}" if name else key)
            shape = tuple(meta.shape)
            box = plan.placement(global_name).box(global_name, shape, mesh.layout, mesh.coordinates)
            whole = plan.placement(global_name).unpadded(shape)
            values, trained = box_values(global_name, whole, box, fill), isinstance(meta, nn.Parameter)
            values = values.to(device=device, dtype=dtype if trained else accurate_dtype(dtype))
            made[id(meta)] = nn.Parameter(values) if trained else values
            made[id(meta)].global_shape = whole  # type: ignore[attr-defined]
            made[id(meta)].box = box  # type: ignore[attr-defined]
        setattr(module, key, made[id(meta)])


def box_values(name: str, whole: tuple[int, ...], box: Box, fill: Fill) -> torch.Tensor:
    """Returns the values of `box`, with zeros where it goes beyond the global tensor of shape `whole`."""
    if box.inside(whole):
        return fill(name, whole, box)
    own = box.within(whole)
    part = fill(name, whole, own) if own else None
    values = torch.zeros(box.shape, device=None if part is None else part.device)
    if own and part is not None:
        values[own.slices(box.offset)] = part
    return values


def _block(module: nn.Module, mesh: Mesh, sequence: bool) -> None:
    if mesh.group("tensor").size > 1:
        wrap_block(module, mesh.group("tensor"), sequence)


def _embedding(module: Any, mesh: Mesh, sequence: bool) -> None:
    if mesh.group("tensor").size > 1:
        module.lookup = partial(sharded_embedding, group=mesh.group("tensor"), sequence=sequence)


def _positions(module: Any, mesh: Mesh, sequence: bool) -> None:
    if sequence:
        module.slice = mesh.at("tensor")


def _heads(module: Any, mesh: Mesh, sequence: bool) -> None:
    module.first = mesh.at("tensor") * module.heads // mesh.layout.tensor


def _norm(module: Any, mesh: Mesh, sequence: bool) -> None:
    if mesh.group("tensor").size > 1:
        module.group = mesh.group("tensor")


def _head(module: Any, mesh: Mesh, sequence: bool) -> None:
    if mesh.group("tensor").size > 1:
        wrap_block(module, mesh.group("tensor"), sequence, leaves=False)
        module.loss = partial(module.loss, group=mesh.group("tensor"))


def _experts(module: Any, mesh: Mesh, sequence: bool) -> None:
    if mesh.group("expert").size > 1:
        module.exchange = ExpertParallel(mesh.group("expert"))


_BOUNDARIES: dict[str, Callable[[Any, Mesh, bool], None]] = {
    "block": _block,
    "embedding": _embedding,
    "positions": _positions,
    "heads": _heads,
    "norm": _norm,
    "head": _head,
    "experts": _experts,
}
