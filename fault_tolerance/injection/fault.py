"""A planned fault: when and where it strikes, and what it can access there."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from bagualu.comm.monitor import Monitor


class ProcessKilled(BaseException):
    """On the simulated backend, a rank whose process would be gone. Like SIGKILL, it escapes `except Exception`."""


class Scene(Protocol):
    """What a fault can access on the rank that it strikes."""

    @property
    def rank(self) -> int: ...

    @property
    def monitor(self) -> Monitor: ...

    @property
    def one_process(self) -> bool:
        """Whether the ranks are threads, so that a signal would hit all of them."""
        ...

    def folder(self, what: str) -> Path | None:
        """Returns the folder of "checkpoint"s, on storage, or "replica"s, in memory; None if there is none."""

    def given_up(self) -> bool:
        """Whether ranks are threads and the other ranks have given up waiting."""

    def spoil_gradient(self, how: Literal["nan", "flip"]) -> str:
        """Makes an element of this rank's gradient NaN, or flips one of its bits, in the next backward pass; returns which
        element."""

    def flip(self, what: str) -> str:
        """Flips a bit of an element of this rank's weight, master weight or moment; returns which element."""


@dataclass(frozen=True)
class Fault(ABC):
    """Strikes `rank` once, when it first reaches point `at` in step `step` (from 1) or later."""

    kind: ClassVar[str]
    points: ClassVar[tuple[str, ...]] = ()
    """The points at which it can strike; empty: all."""
    ends_process: ClassVar[bool] = False
    """Whether the rank's process cannot continue on its own."""

    step: int
    rank: int = 0
    at: str = "data"

    @abstractmethod
    def strike(self, scene: Scene) -> str | None:
        """Causes the fault; returns details that the fault's own text lacks, or None."""

    def __str__(self) -> str:
        """Returns the text of the fault as it is typed in a recipe."""
        given = {item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) != item.default}
        return f"{self.kind}@" + ":".join(f"{name}={value}" for name, value in given.items())
