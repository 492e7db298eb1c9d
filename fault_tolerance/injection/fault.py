"""A planned fault: when and where it strikes, and what it can access there."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from bagualu.comm.monitor import Monitor


class ProcessKilled(BaseException):
    """Ends a rank of the simulated backend, where a kill would end all ranks. Like SIGKILL, it escapes `except Exception`."""


class Scene(Protocol):
    """What a fault can access on the rank that it strikes."""

    @property
    def rank(self) -> int: ...

    @property
    def monitor(self) -> Monitor: ...

    @property
    def one_process(self) -> bool:
        """Whether the ranks are threads of one process, so that a signal would hit all of them."""
        ...

    def folder(self, what: str) -> Path | None:
        """Returns the folder of checkpoints (on storage) or replicas (in memory) for `what`, "checkpoint" or "replica"; None if
        there is none."""

    def given_up(self) -> bool:
        """Returns whether the ranks are threads and their communication has failed, so that nothing waits for this rank any
        more."""

    def spoil_gradient(self, how: Literal["nan", "flip"]) -> str:
        """Makes an element of the gradient of this rank's weights NaN ("nan"), or flips one of its bits ("flip"), in the next
        backward pass; returns a text that names the element."""

    def flip(self, what: str) -> str:
        """Flips a bit of an element of this rank's `what`: "weight", "master" weight or "moment". Returns a text that names the
        element."""


@dataclass(frozen=True)
class Fault(ABC):
    """A fault that strikes `rank` once, when that rank first begins phase `at` in step `step` or later (from 1; 0: before the first
    step)."""

    kind: ClassVar[str]
    points: ClassVar[tuple[str, ...]] = ()
    """The phases at whose beginning the fault can strike; empty: all phases."""
    ends_process: ClassVar[bool] = False
    """Whether the fault makes the rank's process unable to continue training."""

    step: int
    rank: int = 0
    at: str = "data"

    @abstractmethod
    def strike(self, scene: Scene) -> str | None:
        """Causes the fault. Returns what happened as far as the fault's own text does not say it, e.g. the changed byte; None if
        there is nothing to add."""

    def __str__(self) -> str:
        """Returns the text of the fault as it is typed in a recipe."""
        given = {item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) != item.default}
        return f"{self.kind}@" + ":".join(f"{name}={value}" for name, value in given.items())
