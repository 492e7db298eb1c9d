"""Initial weights as a function of (seed, parameter name, block), so that they are the same on every layout.

A tensor is cut into blocks of at most 1,024 elements along its last two dims and 1 along any other. Each block has its own random
numbers, drawn on the CPU in float32. A rank draws only the blocks that its box touches.
"""

import hashlib
from functools import partial
from itertools import product

import torch

from bagualu.parallel.boxes import Box
from bagualu.parallel.parallelize import Fill
from bagualu.parallel.sharding import ShardingPlan
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.plan import decoder_plan

BLOCK = 1024


def seeded_values(model: ModelConfig, seed: int) -> Fill:
    """Returns the function that makes the first weights and buffers of `model`, with weights drawn from `seed`."""
    plan = decoder_plan(model, sequence=False)  # which changes no value
    return partial(initial_values, plan, seed, model.initial_std, model.layers)


def normal_values(seed: int, name: str, shape: tuple[int, ...], box: Box, std: float) -> torch.Tensor:
    """Returns the elements `box` of the tensor `name` of `shape`: normal with mean 0 and deviation `std`, float32 on the CPU."""
    extents = [1] * (len(shape) - 2) + [BLOCK] * min(2, len(shape))
    values = torch.empty(box.shape)
    touched = [range(o // e, -(-(o + s) // e)) for o, s, e in zip(box.offset, box.shape, extents, strict=True)]
    for index in product(*touched):
        offset = tuple(i * e for i, e in zip(index, extents, strict=True))
        block = Box(offset, tuple(min(e, n - o) for o, e, n in zip(offset, extents, shape, strict=True)))
        common = block.intersection(box)
        if common:
            drawn = torch.empty(block.shape).normal_(0.0, std, generator=_generator(seed, name, index))
            values[common.slices(box.offset)] = drawn[common.slices(block.offset)]
    return values


def _generator(seed: int, name: str, index: tuple[int, ...]) -> torch.Generator:
    key = f"{seed}/{name}/{','.join(map(str, index))}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1)


def initial_values(
    plan: ShardingPlan, seed: int, std: float, layers: int, name: str, shape: tuple[int, ...], box: Box
) -> torch.Tensor:
    """Returns the elements `box` of the tensor `name` of `shape`, float32 on the CPU. Matrices that write into the residual stream
    are smaller by sqrt(2 * layers), so that its variance does not grow with depth (GPT-2)."""
    initial = plan.placement(name).initial
    if initial == "ones":
        return torch.ones(box.shape)
    if initial == "zeros":
        return torch.zeros(box.shape)
    if initial == "fan_in":
        return normal_values(seed, name, shape, box, (3 * shape[-1]) ** -0.5)
    return normal_values(seed, name, shape, box, std / (2 * layers) ** 0.5 if initial == "residual" else std)
