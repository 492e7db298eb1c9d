"""The plain model under torch's own tensor (DTensor) and pipeline parallelism, used directly: what torchtitan builds on."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

from contest.loop import CLIP_NORM, Step, adamw, build_model
from contest.model import Decoder, token_loss
from contest.shapes import Shape

STAGE_LAYERS = {8: (5, 3), 12: (8, 4), 6: (4, 2)}
"""Layers of two stages by FLOPs, as for Bagualu: the head weighs as much as 1.3 layers (3.5 with a vocabulary of 32,000)."""


def tensor_parallel(shape: Shape, precision: str) -> Step:
    """Heads, feed-forward and vocabulary split over all processes, the loss on split logits."""
    model = build_model(shape, precision)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        parallelize_module(layer, mesh, {
            "attention.query": ColwiseParallel(), "attention.key": ColwiseParallel(), "attention.value": ColwiseParallel(),
            "attention.output": RowwiseParallel(), "feed.gate": ColwiseParallel(), "feed.up": ColwiseParallel(),
            "feed.down": RowwiseParallel(),
        })  # fmt: skip
    parallelize_module(model, mesh, {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    })  # fmt: skip
    parameters = list(model.parameters())
    optimizer = _SplitAdamW(parameters, [isinstance(parameter, DTensor) for parameter in parameters])

    def step(inputs: Tensor, labels: Tensor) -> float:
        with loss_parallel():
            loss = model(inputs, labels)
            loss.backward()
        optimizer.step()
        return float(loss.full_tensor() if isinstance(loss, DTensor) else loss)

    return step


def pipeline_parallel(sequences: int, shape: Shape, precision: str) -> Step:
    """Two stages under 1F1B, so many sequences a micro-batch."""
    stage, stages = dist.get_rank(), dist.get_world_size()
    assert stages == 2, "the split over stages is given for two"
    part = _Stage(build_model(shape, precision), STAGE_LAYERS[shape.layers], stage)
    parameters = list(part.parameters())
    optimizer = _SplitAdamW(parameters, [True] * len(parameters))
    pipeline_stage = PipelineStage(part, stage, stages, torch.device("cpu"))
    schedule = Schedule1F1B(pipeline_stage, n_microbatches=shape.batch // sequences, loss_fn=token_loss)

    def step(inputs: Tensor, labels: Tensor) -> float:
        losses: list[Tensor] = []
        schedule.step(*([inputs] if stage == 0 else []), **({"target": labels, "losses": losses} if stage else {}))
        optimizer.step()
        return float(torch.stack(losses).mean()) if losses else 0.0

    return step


class _Stage(nn.Module):
    """The first or the last layers of a decoder, with the embedding or the head."""

    def __init__(self, model: Decoder, layers: tuple[int, ...], stage: int) -> None:
        super().__init__()
        first = sum(layers[:stage])
        self.embedding = model.embedding if stage == 0 else None
        self.layers = model.layers[first : first + layers[stage]]
        self.norm, self.head = (model.norm, model.head) if stage else (None, None)
        self.register_buffer("cos", model.cos, persistent=False)
        self.register_buffer("sin", model.sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) if self.embedding is not None else x
        for layer in self.layers:
            x, _ = layer(x, self.cos, self.sin)
        return self.head(self.norm(x)) if self.head is not None else x


class _SplitAdamW:
    """The plain loop's optimizer on what this process holds, clipped by the norm of the whole model."""

    def __init__(self, parameters: list[nn.Parameter], split: list[bool]) -> None:
        self.parameters, self.split = parameters, split
        self.local = [_local(p.detach()) for p in parameters]
        self.masters = [weights.to(torch.float32, copy=True) for weights in self.local]
        self.inner = adamw(self.masters)

    @torch.no_grad()
    def step(self) -> None:
        squares = torch.zeros(2)  # of the parameters every process holds, and of the split ones
        for parameter, master, split in zip(self.parameters, self.masters, self.split, strict=True):
            assert parameter.grad is not None
            gradient = parameter.grad
            if isinstance(gradient, DTensor):  # it may still be a partial sum
                gradient = gradient.redistribute(placements=parameter.placements)
            master.grad = _local(gradient).float()
            squares[int(split)] += master.grad.square().sum()
            parameter.grad = None
        dist.all_reduce(squares[1:])
        factor = min(1.0, CLIP_NORM / (float(squares.sum().sqrt()) + 1e-6))
        for master in self.masters:
            assert master.grad is not None
            master.grad.mul_(factor)
        self.inner.step()
        for weights, master in zip(self.local, self.masters, strict=True):
            weights.copy_(master)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
