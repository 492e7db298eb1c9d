"""What a chip has to offer to run Bagualu: one `Backend`, which makes a `Transport` for a set of ranks.

A `Transport` moves contiguous tensors and nothing else; `Group` checks arguments, handles the group of one and keeps the
convenience. So a new chip is the methods below, one entry point under `bagualu.backends`, and the conformance suite
(tests/comm/test_conformance.py) to tell whether they are right.
"""

from importlib.metadata import entry_points
from typing import Literal, Protocol

import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.world import World

ReduceOp = Literal["sum", "max"]


class Work(Protocol):
    """A communication under way."""

    def wait(self) -> None:
        """Return when the result is there (on an accelerator: when later kernels will see it). Raises CommunicationError."""


class Transport(Protocol):
    """The collectives of one set of ranks. Positions are places in the group, not global ranks.

    The tensors stay untouched by the caller until `wait`. All members make the same calls in the same order. Tensors are
    contiguous; `output` and `input` do not overlap, but for the two cases named.

    Every call returns at once, but that a collective which is not `asynchronous`, on any member, may return when it is done: its
    caller waits for nothing else.
    """

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp, asynchronous: bool) -> Work: ...
    def all_gather(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        """output: the members' inputs one after the other along dim 0. `input` may be this member's slice of `output`."""

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, asynchronous: bool) -> Work:
        """output: this member's slice along dim 0 of the sum of the inputs. It may be that slice of `input`, whose other slices
        hold nothing of use afterwards."""

    def all_to_all(self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int]) -> Work:
        """Rows input_splits[i] go to position i, output_splits[i] come from it; a split may be 0."""

    def broadcast(self, tensor: torch.Tensor, source: int) -> Work: ...
    def send(self, tensor: torch.Tensor, destination: int) -> Work: ...
    def receive(self, tensor: torch.Tensor, source: int) -> Work:
        """Messages of one pair and direction arrive in the order sent."""

    def barrier(self) -> Work: ...
    def lend(self, numel: int, dtype: torch.dtype) -> torch.Tensor | None:
        """See `Group.lend`; None, on all members, where there is nothing to gain by it."""


class Backend(Protocol):
    """One rank's connection to all others."""

    device: torch.device

    def __init__(self, world: World, timeout_seconds: float) -> None: ...
    def transport(self, ranks: tuple[int, ...], name: str) -> Transport:
        """A transport over `ranks` (global, this rank among them), called by all of them in the same order."""

    def close(self) -> None: ...


def backend_class(name: str) -> type[Backend]:
    """The backend registered under `name` in the entry point group `bagualu.backends`. Raises RecipeError."""
    registered = {entry.name: entry for entry in entry_points(group="bagualu.backends")}
    if name not in registered:
        raise RecipeError(f"comm.backend={name} is unknown; give one of {', '.join(sorted(registered))}")
    found: type[Backend] = registered[name].load()
    return found
