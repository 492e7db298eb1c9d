"""Put a model on the mesh. One function shows the order in which things happen."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from bagualu.parallel.boxes import Box
from bagualu.parallel.expert import ExpertParallel
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.sharding import ShardingPlan
from bagualu.parallel.tensor import wrap_block
from bagualu.parallel.vocabulary import sharded_embedding

Fill = Callable[[str, tuple[int, ...], Box], torch.Tensor]
"""(global name, global shape, box) -> the values of that box, a function of nothing else."""


def parallelize(model: nn.Module, plan: ShardingPlan, mesh: Mesh, sequence: bool, dtype: torch.dtype, fill: Fill) -> None:
    """Turn a model built on the meta device, in its global shapes, into this rank's part of it, in place.

    1. every parameter becomes this rank's box of the global tensor, filled; it keeps `global_shape` and `box`;
    2. modules named in the plan's boundaries get what the tensor and expert axes need around or inside them.
    """
    device = mesh.group("world").device
    _materialise(model, plan, mesh, dtype, device, fill)
    for name, module in model.named_modules():
        for pattern, kind in plan.boundaries:
            if fnmatchcase(name, pattern):
                _BOUNDARIES[kind](module, mesh, sequence)


def _materialise(model: nn.Module, plan: ShardingPlan, mesh: Mesh, dtype: torch.dtype, device: torch.device, fill: Fill) -> None:
    made: dict[int, nn.Parameter] = {}  # a tied parameter is one parameter under two names
    for module_name, module in model.named_modules():
        for key, meta in list(module._parameters.items()):
            if meta is None:
                continue
            if id(meta) not in made:
                name = plan.global_name(f"{module_name}.{key}" if module_name else key)
                shape = tuple(meta.shape)
                box = plan.placement(name).box(name, shape, mesh.layout, mesh.coordinates)
                values = fill(name, shape, box).to(device=device, dtype=dtype)
                made[id(meta)] = nn.Parameter(values)
                made[id(meta)].global_shape = shape  # type: ignore[attr-defined]
                made[id(meta)].box = box  # type: ignore[attr-defined]
            module._parameters[key] = made[id(meta)]


def _block(module: nn.Module, mesh: Mesh, sequence: bool) -> None:
    if mesh.group("tensor").size > 1:
        wrap_block(module, mesh.group("tensor"), sequence)


def _embedding(module: Any, mesh: Mesh, sequence: bool) -> None:
    if mesh.group("tensor").size > 1:
        module.lookup = partial(sharded_embedding, group=mesh.group("tensor"), sequence=sequence)


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
    "head": _head,
    "experts": _experts,
}
