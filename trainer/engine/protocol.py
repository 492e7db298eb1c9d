"""The interface of an engine, which steps, checkpoints, the guard and moves of layers use.

An engine holds the layers of a rank with their weights, gradients and optimizer state. Only the engine knows how the ranks of the
data axis divide these among themselves.
"""

from collections.abc import Iterator
from typing import Protocol

import torch

from bagualu.fault_tolerance.guard.engine import GuardedEngine
from bagualu.parallel.boxes import TensorPiece
from bagualu.parallel.pipeline.runtime import Slices, WeightGradients
from bagualu.trainer.models.model import Model


class IncomingState(Protocol):
    """A state that is being read into host memory of its own. Engine and model do not change before `apply`."""

    def pieces(self) -> Iterator[TensorPiece]:
        """Yields the memory to fill: every box of weights, moments and buffers that this rank holds."""

    def apply(self, updates: int) -> None:
        """Makes the values that were read the state of the engine and the model. `updates`: the number of optimizer updates that
        led to that state. Collective."""


class Engine(GuardedEngine, WeightGradients, Protocol):
    """The engine of one rank. A step calls `begin`, runs the backward passes, then calls `finish` and `norm_squared`, and if its
    update is to be applied, `step` and `spoilt`."""

    @property
    def model(self) -> Model:
        """This rank's layers, whose parameters and buffers are the working state."""

    @property
    def slices(self) -> Slices:
        """What runs a stage of this rank: `model`, or what the engine puts around it."""

    @property
    def parameters(self) -> int:
        """The number of parameter elements that this rank counts. Each element counts on one rank: the sum over ranks is the
        model's size, without the padding of its vocabulary."""

    def leaves(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the name and the tensor of every parameter of this rank as backward passes know it: a leaf of autograd's graph. It
        may have no memory between passes."""

    def begin(self, micro_batches: int) -> None:
        """Prepares for a step in which each parameter takes part in `micro_batches` backward passes."""

    def finish(self) -> None:
        """Completes the reduction of gradients. Call after the last backward pass. Collective."""

    def norm_squared(self) -> torch.Tensor:
        """Returns the squared norm of the gradient elements that this rank counts, a float64 scalar. The sum over all ranks is the
        squared norm of the whole gradient, which includes the loss scale. It is not finite if any gradient with which this rank
        updates weights is not."""

    def step(self, lr: float, gradient_factor: float) -> None:
        """Updates this rank's state with the gradients times `gradient_factor` (clipping, loss scale), and the working weights of
        all ranks. If `spoilt` then finds values that are not finite on a rank, others may have received them as working weights,
        until `publish`. Collective."""

    def spoilt(self) -> list[tuple[int, str]]:
        """Returns (index in `shards()`, kind of state) of every tensor of this rank that the last `step` left not finite."""

    def held(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (kind, tensor) for every tensor that this rank keeps between steps, by the kinds of parallel/memory_kinds.py.
        Several tensors may have the same storage."""

    def pieces(self) -> Iterator[TensorPiece]:
        """Yields what checkpoints hold: the master weights, moments and buffers that this rank owns, as boxes of global tensors."""

    def incoming(self) -> IncomingState:
        """Returns new memory to read a state into."""

    def open(self) -> None:
        """Sets up what ranks use together: gradient buffers that other ranks can read in place, where that is faster, and the
        routes of matrices that an update needs whole. Call before the first step, when all ranks hold their layers. Collective."""

    def close(self) -> None:
        """Removes the hooks that tie the model to this engine. Neither the engine nor its model is used afterwards."""
