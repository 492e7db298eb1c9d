"""The interface that a chip implements to run Bagualu: a `Backend`, which makes a `Transport` for each group of ranks.

A `Transport` only moves contiguous tensors. `Group` checks the arguments, handles groups of a single rank and adds the
conveniences. To support a new chip, implement the methods below, register the class under the entry point group
`bagualu.backends` and pass the conformance suite (tests/comm/test_conformance.py).
"""

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Literal, Protocol

import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.world import World

ReduceOp = Literal["sum", "max"]


class Work(Protocol):
    """A communication in progress."""

    def wait(self) -> None:
        """Returns once the result is available (on an accelerator, to kernels launched from now on). Raises CommunicationError if
        the communication failed."""


class Transport(Protocol):
    """The collectives of one group of ranks. Every position is an index into the group, not a global rank.

    All ranks of the group make the same calls in the same order, with the same `asynchronous`. The caller leaves the tensors of
    a call untouched until `wait` returns. Tensors are contiguous. `output` and `input` never overlap, except where stated below.

    Each call starts a communication and returns its `Work`. Calls do not block, except collectives with asynchronous=False, which
    may block until they finish.
    """

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp, asynchronous: bool) -> Work: ...
    def all_gather(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        """Fills output with the inputs of all positions, concatenated along dim 0. `input` may be this rank's slice of `output`."""

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        """Fills output with this rank's slice, along dim 0, of the sum of all inputs. `output` may be that slice of `input`; the
        other slices of `input` are undefined afterwards."""

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int], asynchronous: bool
    ) -> Work:
        """Sends input_splits[i] rows to position i and receives output_splits[i] rows from it; a split may be 0."""

    def broadcast(self, tensor: torch.Tensor, source: int) -> Work: ...
    def send(self, tensor: torch.Tensor, destination: int) -> Work: ...
    def receive(self, tensor: torch.Tensor, source: int) -> Work:
        """Fills tensor with the next message from position `source`; messages arrive in the order sent."""

    def barrier(self) -> Work: ...
    def lend(self, numel: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Makes a tensor as `Group.lend` describes, or returns None on every rank if memory cannot be shared or sharing gains
        nothing."""


class Backend(Protocol):
    """One rank's connection to all other ranks."""

    device: torch.device

    def __init__(self, world: World, timeout_seconds: float) -> None: ...
    def transport(self, ranks: Sequence[int], name: str) -> Transport:
        """Returns a new transport between `ranks`, global ranks that include this rank. All of these ranks call this method, and
        make the groups that they have in common in the same order."""

    def close(self) -> None: ...


def backend_class(name: str) -> type[Backend]:
    """Returns the class registered as `name` in the entry point group `bagualu.backends`. Raises RecipeError if there is none."""
    registered = {entry.name: entry for entry in entry_points(group="bagualu.backends")}
    if name not in registered:
        raise RecipeError(f"comm.backend={name} is unknown; give one of {', '.join(sorted(registered))}")
    backend: type[Backend] = registered[name].load()
    return backend
