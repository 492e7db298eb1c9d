"""Stochastic rounding to bfloat16, by bits that depend on nothing but the seed, the parameter, the element and the step.

So every layout rounds an element in the same way, and a resumed run rounds as the one that was never stopped. arXiv 2010.06192
describes why values that are rounded to nearest stop changing.
"""

import hashlib

import torch

from bagualu.parallel.boxes import flat_range_to_boxes
from bagualu.parallel.data.shard import ShardEntry

_LOW = 0xFFFF
"""The bits of a float32 that a bfloat16 lacks."""


def element_numbers(entry: ShardEntry, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Returns the flat indices in the global tensor, int64 [stop - start], of elements start .. stop - 1 of a parameter's part."""
    strides = [1]
    for size in reversed(entry.global_shape[1:]):
        strides.insert(0, strides[0] * size)
    numbers = []
    for _, box in flat_range_to_boxes(entry.box.shape, start, stop):
        index = torch.zeros((), dtype=torch.int64, device=device)
        for offset, size, own, stride in zip(entry.box.offset, box.shape, box.offset, strides, strict=True):
            index = index.unsqueeze(-1) + torch.arange(offset + own, offset + own + size, device=device) * stride
        numbers.append(index.flatten())
    return torch.cat(numbers) if numbers else torch.empty(0, dtype=torch.int64, device=device)


def noise(seed: int, name: str, numbers: torch.Tensor, step: int, elements: int) -> torch.Tensor:
    """Returns 32 random bits, int32, for each element of the parameter `name` of so many `elements`, given its number, in update
    `step`.

    They are MurmurHash3's finalizer of the number plus a hash of the rest: 32-bit products are vectors on every chip.
    """
    digest = hashlib.blake2b(f"{seed}/{name}/{step}".encode(), digest_size=8).digest()
    bits = (numbers + int.from_bytes(digest[:4])).to(torch.int32)
    if elements > 2**32:
        bits ^= ((numbers >> 32) * int.from_bytes(digest[4:])).to(torch.int32)
    for shift, multiplier in ((16, -0x7A143595), (13, -0x3D4D51CB)):  # 0x85ebca6b and 0xc2b2ae35, signed
        bits.bitwise_xor_((bits >> shift).bitwise_and_(2 ** (32 - shift) - 1)).mul_(multiplier)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(_LOW))


def round_stochastically(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Returns float32 `values` as bfloat16: each becomes one of its two neighbours, on average itself. `bits`: 16 random bits for
    each. A value that bfloat16 holds stays what it is; so do infinity and NaN."""
    rounded = (values.view(torch.int32) + bits).bitwise_and_(~_LOW).view(torch.float32)
    return rounded.masked_fill_(values.isnan(), torch.nan).to(torch.bfloat16)  # one whose bits are all set became 0
