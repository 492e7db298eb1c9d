"""The rules by which weights are updated, element by element, on flat tensors of any length.

Every rule changes weight and moments in place, given the reduced and clipped gradient, whose values it may overwrite.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from bagualu.trainer.optim.config import OptimConfig


class Rule(Protocol):
    @property
    def telling(self) -> str | None:
        """The moment that an update can make non-finite while the weight stays finite; None if there is none."""

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, moments: Mapping[str, torch.Tensor], step: torch.Tensor, lr: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        """Does an update. `moments` are those of `OptimConfig.moments`. `step`: the number of updates, this one included, a float32
        scalar."""


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101).

    It calls the fused kernel of torch.optim.AdamW directly: torch's optimizer would import torch's compiler, which takes a second
    and 70 MB, and can only update a tensor as a whole.
    """

    betas: tuple[float, float]
    epsilon: float
    telling: str | None = "exp_avg_sq"

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, moments: Mapping[str, torch.Tensor], step: torch.Tensor, lr: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        torch._fused_adamw_(
            [weight], [gradient], [moments["exp_avg"]], [moments["exp_avg_sq"]], [], [step], lr=lr, beta1=self.betas[0],
            beta2=self.betas[1], weight_decay=weight_decay, eps=self.epsilon, amsgrad=False, maximize=False,
        )  # fmt: skip


@dataclass(frozen=True)
class SGD:
    """Gradient descent with momentum, as torch.optim.SGD: the decay is added to the gradient, and so to the momentum."""

    momentum: float

    @property
    def telling(self) -> str | None:
        return "momentum_buffer" if self.momentum else None

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, moments: Mapping[str, torch.Tensor], step: torch.Tensor, lr: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        if weight_decay:
            gradient.add_(weight, alpha=weight_decay)
        if self.momentum:
            gradient = moments["momentum_buffer"].mul_(self.momentum).add_(gradient)
        weight.add_(gradient, alpha=-lr)


@dataclass(frozen=True)
class Lion:
    """The sign of an interpolated momentum, with decoupled weight decay (arXiv 2302.06675, algorithm 2)."""

    betas: tuple[float, float]
    telling: str | None = "exp_avg"

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, moments: Mapping[str, torch.Tensor], step: torch.Tensor, lr: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        average = moments["exp_avg"]
        if weight_decay:
            weight.mul_(1 - lr * weight_decay)
        weight.add_(torch.lerp(gradient, average, self.betas[0]).sign_(), alpha=-lr)
        average.lerp_(gradient, 1 - self.betas[1])


@dataclass(frozen=True)
class MuonMomentum:
    """The first half of Muon's update: Nesterov momentum takes the gradient's place, and weights stay as they are.

    muon.py makes whole matrices of it orthogonal before `MuonStep`. As in torch.optim.Muon, the momentum is an average.
    """

    momentum: float

    @property
    def telling(self) -> str | None:
        return "momentum_buffer" if self.momentum else None

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, moments: Mapping[str, torch.Tensor], step: torch.Tensor, lr: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        if self.momentum:
            gradient.lerp_(moments["momentum_buffer"].lerp_(gradient, 1 - self.momentum), self.momentum)


@dataclass(frozen=True)
class MuonStep:
    """The second half of Muon's update: a step against `gradient`, by then orthogonal, with decoupled weight decay."""

    telling: str | None = None

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, moments: Mapping[str, torch.Tensor], step: torch.Tensor, lr: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        if weight_decay:
            weight.mul_(1 - lr * weight_decay)
        weight.add_(gradient, alpha=-lr)


def rule_of(config: OptimConfig, optimizer: str) -> Rule:
    """Returns the rule of `Treatment.optimizer`; of muon the first half."""
    first, second = config.betas
    rules: dict[str, Rule] = {
        "adamw": AdamW((first, second), config.epsilon),
        "lion": Lion((first, second)),
        "muon": MuonMomentum(config.momentum_kept),
        "sgd": SGD(config.momentum_kept),
    }
    return rules[optimizer]
