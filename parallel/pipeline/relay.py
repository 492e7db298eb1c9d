"""Passes one batch through all stages of a pipeline once, without gradients."""

from collections.abc import Callable

import torch

from bagualu.parallel.mesh import Mesh


def relay(
    mesh: Mesh,
    run: Callable[[torch.Tensor, int], torch.Tensor],
    inputs: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """Returns the output of the last stage on the ranks that hold it, None on the others. Collective over the pipeline.

    run(x, chunk) computes the rank's stage number `chunk`. The model's first stage gets `inputs`, every other stage what the stage
    before it returned, of `shape` and `dtype`.
    """
    own, placement, x = mesh.at("pipeline"), mesh.placement, inputs
    for chunk, stage in enumerate(mesh.stages):
        source = placement.neighbour(stage, -1)
        if source is not None:
            x = torch.empty(shape, dtype=dtype, device=mesh.group("world").device)
            mesh.messages(False, source, own).receive(x, source)
        x = run(x, chunk)
        destination = placement.neighbour(stage, 1)
        if destination is not None:
            mesh.messages(False, own, destination).send(x.contiguous(), destination)
    return x if mesh.last_stage else None


def share_from_last_stage(mesh: Mesh, tensor: torch.Tensor) -> None:
    """Replaces `tensor` on all ranks of the pipeline by that of the rank with the last stage. Collective over the pipeline."""
    mesh.group("pipeline").broadcast(tensor, mesh.placement.rank_of(mesh.placement.stages - 1))
