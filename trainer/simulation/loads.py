"""The load of experts in a trace, where no router has values: given explicitly as the share of each expert."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from bagualu.comm.group import Group
from bagualu.parallel.expert import Loads, LocalExperts


def balanced(experts: int) -> list[float]:
    """Returns equal shares."""
    return [1 / experts] * experts


def skewed(experts: int, ratio: float) -> list[float]:
    """Returns shares that fall evenly from the first expert to the last, of which the first has `ratio` (from 1 to 2) times the
    mean."""
    step = 2 * (ratio - 1) / max(1, experts - 1)
    return [(ratio - step * index) / experts for index in range(experts)]


def divide(rows: int, shares: Sequence[float]) -> list[int]:
    """Returns whole numbers that sum to `rows`, each less than 1 away from its share of them."""
    ends = [round(end * rows / sum(shares)) for end in accumulate(shares)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


class GivenLoads(Loads):
    """Every rank's router gives expert e the share `shares[e]` of its rows."""

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = shares

    def of_experts(self, counts: torch.Tensor, rows: int) -> list[int]:
        return divide(rows, self._shares)

    def exchanged(
        self, counts: torch.Tensor, arriving: torch.Tensor, rows: int, group: Group
    ) -> tuple[list[int], list[int], list[int]]:
        by_expert = divide(rows, self._shares)
        own = len(by_expert) // group.size
        sent = [sum(by_expert[position * own : (position + 1) * own]) for position in range(group.size)]
        here = by_expert[group.rank * own : (group.rank + 1) * own]
        return sent, [sent[group.rank]] * group.size, [rows * group.size for rows in here]


def give(model: nn.Module, loads: Loads) -> None:
    """Makes all mixtures of `model` take `loads` instead of reading their router's choice."""
    for module in model.modules():
        for held in vars(module).values():
            if isinstance(held, LocalExperts):
                held.loads = loads
