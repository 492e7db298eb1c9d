"""What a step, checkpoints, the guard and moves of layers need of an engine.

An engine holds the layers of one rank with everything that is as long as they are: weights, gradients and optimizer state. How the
ranks of the data axis divide these among themselves is known to the engine alone.
"""

from collections.abc import Iterator
from typing import Protocol

import torch

from bagualu.fault_tolerance.guard.engine import GuardedEngine
from bagualu.parallel.boxes import TensorPiece
from bagualu.parallel.pipeline.runtime import WeightGradients
from bagualu.trainer.models.model import Model


class IncomingState(Protocol):
    """A state that is being read, in host memory of its own: engine and model stay as they are until `apply`."""

    def pieces(self) -> Iterator[TensorPiece]:
        """The memory to fill: every box of weights, moments and buffers that this rank holds."""

    def apply(self, updates: int) -> None:
        """Makes what was read, after `updates` updates, the state of the engine and the model. Collective."""


class Engine(GuardedEngine, WeightGradients, Protocol):
    """One rank's. A step is: `begin`, backward passes, `finish`, `norm_squared`, and if all agree `step` and `share`."""

    @property
    def model(self) -> Model:
        """Its parameters and buffers are this rank's working state."""

    @property
    def parameters(self) -> int:
        """Elements that this rank counts; the sum over all ranks is the size of the model."""

    def begin(self, micro_batches: int) -> None:
        """Prepares for a step in which each parameter takes part in `micro_batches` backward passes."""

    def finish(self) -> None:
        """After the last backward pass: completes the reduction of gradients. Collective."""

    def norm_squared(self) -> torch.Tensor:
        """The squared norm of the gradient elements that this rank counts, a float64 scalar; the sum over all ranks is that of the
        whole gradient. Not finite when any gradient that this rank updates with is not."""

    def step(self, lr: float, gradient_factor: float) -> None:
        """Updates this rank's state with the gradients times `gradient_factor` (clipping, loss scale). The other ranks see nothing
        of it before `share`."""

    def spoilt(self) -> list[tuple[int, str]]:
        """(position in `shards()`, kind) of this rank's state that the last `step` left with values that are not finite."""

    def share(self) -> None:
        """Gives the other ranks this rank's part of the updated working weights, and takes theirs. Collective."""

    def pieces(self) -> Iterator[TensorPiece]:
        """Master weights, moments and buffers that this rank owns, as boxes of the global tensors: what checkpoints hold."""

    def incoming(self) -> IncomingState:
        """Fresh memory to read a state into."""

    def open(self) -> None:
        """Before the first step, when all ranks hold their layers: agrees on memory that ranks share. Collective."""

    def close(self) -> None:
        """Releases what ties the model to this engine; nothing of it is used afterwards."""
