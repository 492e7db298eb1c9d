"""The load of experts in a trace, where no router has values: given explicitly as the share of each expert, in every layer alike or
by layer.

Shapes: E experts, all those of a layer.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from bagualu.comm import jsonl
from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Group
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.parallel.expert import Loads, LocalExperts
from bagualu.trainer.models.decoder.config import ModelConfig

Shares: TypeAlias = Sequence[float] | Mapping[int, Sequence[float]]
"""The share of each expert [E] in the rows of a layer: the same for all layers, or by the number of the layer."""
MOST_CLASSES = 8
"""The most classes of expert ranks that a trace tells apart: each is traced."""
_LAYER = re.compile(r"layers\.(\d+)\.")


def balanced(experts: int) -> list[float]:
    """Returns equal shares."""
    return [1 / experts] * experts


def skewed(experts: int, ratio: float) -> list[float]:
    """Returns shares of which the first is `ratio` times the mean and each other the same fraction of the one before it. Raises
    RecipeError unless `ratio` lies between 1 and the number of experts."""
    if not 1 <= ratio <= experts:
        raise RecipeError(f"the fullest of {experts} experts has from 1 to {experts} times the mean load, not {ratio:g}")
    low, high = 0.0, 1.0
    for _ in range(200):  # the larger the fraction, the less the first expert has
        middle = (low + high) / 2
        low, high = (middle, high) if experts / sum(middle**index for index in range(experts)) > ratio else (low, middle)
    total = sum(high**index for index in range(experts))
    return [high**index / total for index in range(experts)]


def of_run(run: Path, model: ModelConfig) -> dict[int, list[float]]:
    """Returns the shares of the experts of each mixture layer of `model` at the last validation of a run. Raises RecipeError if the
    run has recorded none or its mixtures are others."""
    records = [record["expert_loads"] for record in jsonl.read(RunDirectory(run).metrics) if "expert_loads" in record]
    if not records:
        raise RecipeError(f"{run} has no loads of experts in metrics.jsonl; give the directory of a run that has validated a model "
                          "with mixtures of experts")  # fmt: skip
    counts = {int(layer): list(map(float, loads)) for layer, loads in records[-1].items()}
    layers = [layer for layer in range(model.layers) if model.is_moe_layer(layer)]
    if sorted(counts) != layers or any(len(loads) != model.moe.experts for loads in counts.values()):
        experts = len(next(iter(counts.values()), []))
        raise RecipeError(f"{run} has loads of {experts} experts in layers {sorted(counts)}, but the recipe has "
                          f"{model.moe.experts} in layers {layers}; give the directory of a run of the same model")  # fmt: skip
    return {layer: [load / max(1.0, sum(loads)) for load in loads] for layer, loads in counts.items()}


def read_shares(text: str, model: ModelConfig) -> Shares:
    """Returns the shares that `text` describes: balanced; skewed:R, of which the fullest has R times the mean; or the directory of
    a run, those at its last validation. Raises RecipeError."""
    experts = model.moe.experts
    if text == "balanced":
        return balanced(experts)
    if not text.startswith("skewed:"):
        return of_run(Path(text), model)
    try:
        ratio = float(text.removeprefix("skewed:"))
    except ValueError:
        raise RecipeError(f"{text} is no skew; give e.g. skewed:1.5, where the fullest expert has 1.5 times the mean") from None
    return skewed(experts, ratio)


def by_layer(shares: Shares | None, model: ModelConfig) -> dict[int, Sequence[float]]:
    """Returns the shares of each mixture layer; None: equal shares. Layers with the same shares have the same object."""
    layers = [layer for layer in range(model.layers) if model.is_moe_layer(layer)]
    if isinstance(shares, Mapping):
        return {layer: shares[layer] for layer in layers}
    return dict.fromkeys(layers, shares or balanced(model.moe.experts)) if layers else {}


def distinct(shares: Mapping[int, Sequence[float]]) -> dict[int, Sequence[float]]:
    """Returns the different objects among `shares`, by their id."""
    return {id(one): one for one in shares.values()}


def in_classes(shares: Mapping[int, Sequence[float]], ranks: int) -> dict[int, Sequence[float]]:
    """Returns shares with which the experts of at most MOST_CLASSES of `ranks` expert ranks differ.

    If more of them differ, those of each layer are sorted by their load. The fullest, for which all wait, keeps its own; the others
    get the mean of a group of neighbours.
    """
    found = distinct(shares)
    ranks_differ = len({tuple(tuple(_of_rank(one, rank, ranks)) for one in found.values()) for rank in range(ranks)})
    if ranks_differ <= MOST_CLASSES:
        return dict(shares)
    classed = {key: _in_classes(one, ranks) for key, one in found.items()}
    return {layer: classed[id(one)] for layer, one in shares.items()}


def _of_rank(shares: Sequence[float], rank: int, ranks: int) -> Sequence[float]:
    own = len(shares) // ranks
    return shares[rank * own : (rank + 1) * own]


def _in_classes(shares: Sequence[float], ranks: int) -> list[float]:
    by_rank = sorted((sorted(_of_rank(shares, rank, ranks), reverse=True) for rank in range(ranks)), key=sum, reverse=True)
    ends = [1 + (ranks - 1) * part // (MOST_CLASSES - 1) for part in range(MOST_CLASSES)]
    groups = [by_rank[:1], *(by_rank[begin:end] for begin, end in pairwise(ends))]
    means = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]
    return [share for group, mean in zip(groups, means, strict=True) for _ in group for share in mean]


def divide(rows: int, shares: Sequence[float]) -> list[int]:
    """Returns whole numbers that sum to `rows`, each less than 1 away from its share of them."""
    ends = np.cumsum(shares)
    counts: list[int] = np.diff(np.rint(ends * rows / ends[-1]), prepend=0.0).astype(np.int64).tolist()
    return counts


class GivenLoads(Loads):
    """Every rank's router gives expert e the share `shares[e]` of its rows."""

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = shares
        self._known: dict[tuple[int, int, int], tuple[list[int], list[int], list[int]]] = {}

    def of_experts(self, counts: torch.Tensor, rows: int) -> list[int]:
        return divide(rows, self._shares)

    def exchanged(
        self, counts: torch.Tensor, arriving: torch.Tensor, rows: int, group: Group
    ) -> tuple[list[int], list[int], list[int]]:
        """If there are fewer rows than ranks, each rank sends to some ranks only, and a rank receives what it gets on average."""
        super().exchanged(counts, arriving, rows, group)  # the kernels that count rows are part of the step
        key = rows, group.rank, group.size
        if key not in self._known:
            own = len(self._shares) // group.size
            sent = np.reshape(divide(rows, self._shares), (group.size, own)).sum(1).tolist()
            here = divide(rows * group.size, self._shares)[group.rank * own : (group.rank + 1) * own]
            self._known[key] = sent, divide(sum(here), [1.0] * group.size), here
        return self._known[key]


def give(model: nn.Module, shares: Mapping[int, Sequence[float]]) -> None:
    """Makes the mixtures of the layers of `model` take these shares instead of reading their router's choice."""
    given = {key: GivenLoads(one) for key, one in distinct(shares).items()}
    loads = {layer: given[id(one)] for layer, one in shares.items()}
    for name, module in model.named_modules():
        layer = _LAYER.match(name)
        for held in vars(module).values():
            if layer and isinstance(held, LocalExperts):
                held.loads = loads[int(layer[1])]
