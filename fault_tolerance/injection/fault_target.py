"""Gives planned faults access to a rank: its model, its optimizer state and its folders."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bagualu.comm.group import Communicator
from bagualu.comm.monitor import Monitor
from bagualu.parallel.boxes import TensorPiece

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_KINDS = {"master": "weight/", "moment": "exp_avg/"}


@dataclass
class RankScene:
    """The `Scene` of a real rank. `leaves` returns the names and tensors of its parameters as backward passes know them, `state`
    views of the pieces of its optimizer state."""

    communicator: Communicator
    leaves: Callable[[], Iterable[tuple[str, torch.Tensor]]]
    state: Callable[[], Iterable[TensorPiece]]
    checkpoints: Path
    replicas: Path | None

    @property
    def rank(self) -> int:
        return self.communicator.rank

    @property
    def monitor(self) -> Monitor:
        return self.communicator.monitor

    @property
    def one_process(self) -> bool:
        return self.communicator.one_process

    def folder(self, what: str) -> Path | None:
        return self.checkpoints if what == "checkpoint" else self.replicas

    def given_up(self) -> bool:
        return self.communicator.given_up()

    def spoil_gradient(self, how: Literal["nan", "flip"]) -> str:
        trainable = next(((name, parameter) for name, parameter in self._vectors() if parameter.requires_grad), None)
        if trainable is None:
            return "nothing, because every norm of this rank is frozen"
        name, parameter = trainable

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            handle.remove()
            spoiled = gradient.clone()
            if how == "nan":
                spoiled.view(-1)[0] = math.nan
            else:
                flip_bit(spoiled.view(-1)[:1])
            return spoiled

        handle = parameter.register_hook(spoil)
        return f"element 0 of the gradient of {name}"

    def flip(self, what: str) -> str:
        name: str
        tensor: torch.Tensor
        if what == "weight":
            name, tensor = next(self._vectors())
        else:
            frozen = {f"weight/{name}" for name, leaf in self.leaves() if not leaf.requires_grad}
            pieces = (piece for piece in self.state() if piece.name.startswith(_KINDS[what]) and piece.name not in frozen)
            piece = next(pieces, None)
            if piece is None:
                return f"nothing, because this rank has no {what}"
            name, tensor = piece.name, piece.tensor
        flip_bit(tensor.detach().view(-1)[:1])
        return f"element 0 of {name}"

    def _vectors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the names and the weights of the normalisation layers (parameters of one dim): every step uses them, and their
        gradients go through autograd, not straight to a bucket."""
        return ((name, leaf) for name, leaf in self.leaves() if leaf.ndim == 1)


def flip_bit(cell: torch.Tensor) -> None:
    """Flips the highest fraction bit of `cell`, a tensor of one floating-point number; the number stays finite but changes
    clearly."""
    highest = -round(math.log2(torch.finfo(cell.dtype).eps)) - 1
    cell.view(_INTEGERS[cell.dtype.itemsize]).bitwise_xor_(1 << highest)
