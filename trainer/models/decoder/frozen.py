"""Prepares a decoder that only continues sequences any more, so that a token takes few and quick products.

A token reads every weight once, and that is most of the time that it takes. So linear layers with the same input become a single
product, and on CPUs their weights are packed (operators/packed.py).
"""

from collections.abc import Sequence

import torch
from torch import nn

from bagualu.parallel.precision import accurate_dtype
from bagualu.trainer.models.decoder.adapted import AdaptedModule
from bagualu.trainer.models.decoder.layers import Attention, FeedForward, FrozenLayers, LayerNorm, Linear, RMSNorm
from bagualu.trainer.models.decoder.model import Embedding, Head
from bagualu.trainer.operators.packed import can_pack, pack


@torch.no_grad()
def freeze(model: nn.Module) -> None:
    """Joins and packs the weights of the linear layers of `model`, a decoder or some of its layers, without low-rank factors. It
    can then compute logits without gradients, and nothing else; products are not in float8 any more. The weights take as much
    memory as before; a head that is tied to the embedding has a copy of its own."""
    tied = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    for module in model.modules():
        if isinstance(module, AdaptedModule):
            module.products = module.products.without_float8
        if isinstance(module, Attention):
            _freeze(module.query, module.key, module.value)
            _freeze(module.output)
        elif isinstance(module, FeedForward):
            _freeze(*(layer for layer in (module.gate, module.up) if layer is not None))
            _freeze(module.down)
        elif isinstance(module, RMSNorm | LayerNorm) and module.weight.device.type == "cpu":
            module.to(accurate_dtype(module.weight.dtype))  # in which they are computed
        elif isinstance(module, Head) and can_pack(module.weight):
            module.frozen = _joined([module.weight[: module.real]], [])
            if id(module.weight) not in tied:
                module.weight.data = _without_rows(module.weight)


def _freeze(*layers: Linear) -> None:
    """Replaces the weights of linear layers with the same input by one."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers if layer.bias is not None]
    packs = can_pack(weights[0])
    if len(layers) == 1 and not packs:
        return
    frozen = layers[0].frozen = _joined(weights, biases)
    for layer, part in zip(layers, frozen.weight.split(frozen.widths) if not packs else weights, strict=True):
        layer.weight.data = _without_rows(part) if packs else part


def _joined(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> FrozenLayers:
    weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    bias = torch.cat(list(biases)) if biases else None
    return FrozenLayers(pack(weight) if can_pack(weight) else weight, bias, tuple(map(len, weights)))


def _without_rows(weight: torch.Tensor) -> torch.Tensor:
    return weight.new_empty((0, weight.shape[1]))
