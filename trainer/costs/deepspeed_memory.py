"""What DeepSpeed holds besides the state of a rank: gradients in reduction and, in ZeRO-3, gathered weights.

In ZeRO-3, DeepSpeed gathers weights as far ahead as `stage3_max_live_parameters` allows, and keeps them until they are not needed
again soon; with the defaults, so many are all weights of a small model. Weights that were gathered together are copied from a flat
tensor, which exists until the last of them is used.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from bagualu.trainer.costs.buckets import Transfers
from bagualu.trainer.costs.state import EMBEDDING, Layers, part_of, rank_parameters
from bagualu.trainer.costs.work import ModelWork

_REDUCED_BYTES = 4
"""Per element of gradients in reduction, which are float32."""
_AHEAD, _LIVE = 5 * 10**7, 10**9
"""DeepSpeed's defaults of `stage3_prefetch_bucket_size` and `stage3_max_live_parameters`, in elements."""


def deepspeed_buffers(work: ModelWork, zero: Mapping[str, Any]) -> int:
    """Returns the bytes of the flat tensors in which DeepSpeed collects gradients for their reduction. `zero`: the section
    zero_optimization of its configuration."""
    if work.zero < 2 or not zero.get("contiguous_gradients", True):
        return 0
    count = 2 if work.zero == 2 and zero.get("overlap_comm") else 1
    return int(zero["reduce_bucket_size"]) * _REDUCED_BYTES * count


def deepspeed_transfers(work: ModelWork, zero: Mapping[str, Any], layers: Layers) -> Transfers:
    """Returns what a rank that holds all layers holds for transfers besides `deepspeed_buffers`. `zero` as there."""
    forward, backward, last = Counter[int](), Counter[int](), work.model.layers
    if work.zero < 2:
        return Transfers(forward, backward)
    total = reduced = 0
    for name, shape, units in rank_parameters(work, layers):
        part = part_of(work, name, shape)
        gradient = part.elements * _REDUCED_BYTES * (part.name not in work.frozen)
        total, reduced = total + part.elements * (part.ranks > 1), reduced + gradient
        for unit in units:  # autograd has made a gradient before it is moved to where it is reduced
            backward[unit] = max(backward[unit], gradient)
    at_once = min(reduced, int(zero["reduce_bucket_size"]) * _REDUCED_BYTES)
    for unit in [EMBEDDING] if at_once == reduced else [EMBEDDING, *layers]:
        backward[unit] += at_once  # the reduction's copy
    if work.zero == 3:
        live = min(total, int(zero.get("stage3_max_live_parameters", _LIVE))) * work.item_bytes
        ahead = min(total, int(zero.get("stage3_prefetch_bucket_size", _AHEAD))) * work.item_bytes
        units = [EMBEDDING, *layers, last, last + 1]
        backward += Counter(dict.fromkeys(units, live))
        forward = Counter(dict.fromkeys(units[:-1], live + ahead)) + Counter({last + 1: live})
    return Transfers(forward, backward)
