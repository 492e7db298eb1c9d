"""The rules by which weights are updated, element by element, on flat tensors of any length.

Every rule changes weight and moments in place, given the reduced gradient, whose values it may overwrite.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from bagualu.trainer.operators.update import adamw, same_memory
from bagualu.trainer.optim.config import OptimConfig


@dataclass(frozen=True)
class ShardSlice:
    """Consecutive elements of a shard. Tensors [n]."""

    weight: torch.Tensor
    """The master weights."""
    working: torch.Tensor
    """The weights that the model computes with: the master weights rounded to their dtype, or the same memory."""
    gradient: torch.Tensor
    moments: Mapping[str, torch.Tensor]
    """Those of `OptimConfig.moments`."""
    step: torch.Tensor
    """The number of updates, this one included, a float32 scalar."""


class Rule(Protocol):
    @property
    def telling(self) -> str | None:
        """The moment that an update can make non-finite while the weight stays finite; None if there is none."""

    def update(self, piece: ShardSlice, lr: float, weight_decay: float, factor: float) -> None:
        """Does an update with the gradient times `factor`, and computes the working weights."""


class InPasses:
    """Does an update in several passes: the gradient's factor, the rule itself, and the copy to working weights."""

    def update(self, piece: ShardSlice, lr: float, weight_decay: float, factor: float) -> None:
        """See `Rule.update`."""
        if factor != 1.0:
            piece.gradient.mul_(factor)
        self.move(piece.weight, piece.gradient, piece.moments, lr, weight_decay)
        if not same_memory(piece.weight, piece.working):
            piece.working.copy_(piece.weight)

    def move(
        self, weight: torch.Tensor, gradient: torch.Tensor, moments: Mapping[str, torch.Tensor], lr: float, weight_decay: float
    ) -> None:
        """Changes `weight` and `moments`."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), computed by a variant of the operator `update`."""

    betas: tuple[float, float]
    epsilon: float
    operator: Callable[..., None] = adamw
    telling: str | None = "exp_avg_sq"

    def update(self, piece: ShardSlice, lr: float, weight_decay: float, factor: float) -> None:
        average, square = piece.moments["exp_avg"], piece.moments["exp_avg_sq"]
        self.operator(
            piece.weight,
            piece.working,
            piece.gradient,
            average,
            square,
            piece.step,
            factor,
            lr,
            weight_decay,
            self.betas,
            self.epsilon,
        )


@dataclass(frozen=True)
class SGD(InPasses):
    """Gradient descent with momentum, as torch.optim.SGD: the decay is added to the gradient, and so to the momentum."""

    momentum: float

    @property
    def telling(self) -> str | None:
        return "momentum_buffer" if self.momentum else None

    def move(
        self, weight: torch.Tensor, gradient: torch.Tensor, moments: Mapping[str, torch.Tensor], lr: float, weight_decay: float
    ) -> None:
        if weight_decay:
            gradient.add_(weight, alpha=weight_decay)
        if self.momentum:
            gradient = moments["momentum_buffer"].mul_(self.momentum).add_(gradient)
        weight.add_(gradient, alpha=-lr)


@dataclass(frozen=True)
class Lion(InPasses):
    """The sign of an interpolated momentum, with decoupled weight decay (arXiv 2302.06675, algorithm 2)."""

    betas: tuple[float, float]
    telling: str | None = "exp_avg"

    def move(
        self, weight: torch.Tensor, gradient: torch.Tensor, moments: Mapping[str, torch.Tensor], lr: float, weight_decay: float
    ) -> None:
        average = moments["exp_avg"]
        if weight_decay:
            weight.mul_(1 - lr * weight_decay)
        weight.add_(torch.lerp(gradient, average, self.betas[0]).sign_(), alpha=-lr)
        average.lerp_(gradient, 1 - self.betas[1])


@dataclass(frozen=True)
class MuonMomentum(InPasses):
    """The first half of Muon's update: Nesterov momentum takes the gradient's place, and weights stay as they are.

    muon.py makes whole matrices of it orthogonal before `MuonStep`. As in torch.optim.Muon, the momentum is an average.
    """

    momentum: float

    @property
    def telling(self) -> str | None:
        return "momentum_buffer" if self.momentum else None

    def move(
        self, weight: torch.Tensor, gradient: torch.Tensor, moments: Mapping[str, torch.Tensor], lr: float, weight_decay: float
    ) -> None:
        if self.momentum:
            gradient.lerp_(moments["momentum_buffer"].lerp_(gradient, 1 - self.momentum), self.momentum)


@dataclass(frozen=True)
class MuonStep(InPasses):
    """The second half of Muon's update: a step against `gradient`, by then orthogonal, with decoupled weight decay."""

    telling: str | None = None

    def move(
        self, weight: torch.Tensor, gradient: torch.Tensor, moments: Mapping[str, torch.Tensor], lr: float, weight_decay: float
    ) -> None:
        if weight_decay:
            weight.mul_(1 - lr * weight_decay)
        weight.add_(gradient, alpha=-lr)


def rule_of(config: OptimConfig, optimizer: str, update: Callable[..., None]) -> Rule:
    """Returns the rule of `Treatment.optimizer`; of muon the first half. `update`: the variant of the operator, for AdamW."""
    first, second = config.betas
    rules: dict[str, Rule] = {
        "adamw": AdamW((first, second), config.epsilon, update),
        "lion": Lion((first, second)),
        "muon": MuonMomentum(config.momentum_kept),
        "sgd": SGD(config.momentum_kept),
    }
    return rules[optimizer]
