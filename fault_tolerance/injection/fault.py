"""One planned fault: when it strikes whom, and what it can get at there. Free of torch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from bagualu.comm.monitor import Monitor


class ProcessKilled(BaseException):
    """On the simulated backend: the rank's process would be gone. No `except Exception` sees it, as none sees a SIGKILL."""


class Scene(Protocol):
    """What a fault can get at on the rank it strikes."""

    @property
    def rank(self) -> int: ...

    @property
    def monitor(self) -> Monitor: ...

    @property
    def one_process(self) -> bool:
        """Whether the ranks are threads, so that a signal would hit all of them."""
        ...

    def folder(self, what: str) -> Path | None:
        """Where checkpoints lie: "checkpoint" on storage, "replica" in memory; None where there are none."""

    def given_up(self) -> bool:
        """Threads: whether the other ranks have."""

    def spoil_gradient(self, how: Literal["nan", "flip"]) -> str:
        """In the next backward pass one element of this rank's gradient becomes NaN or has a bit flipped; which one."""

    def flip(self, what: str) -> str:
        """Flip a bit of one element of this rank's weight, master or moment; which one."""


@dataclass(frozen=True)
class Fault(ABC):
    """Strikes `rank` once, the first time that it comes to point `at` in step `step` (from 1) or later."""

    kind: ClassVar[str]
    points: ClassVar[tuple[str, ...]] = ()
    """Where it can strike, if not everywhere."""
    ends_process: ClassVar[bool] = False
    """Whether the rank's process does not go on by itself."""

    step: int
    rank: int = 0
    at: str = "data"

    @abstractmethod
    def strike(self, scene: Scene) -> str | None:
        """Do it; what was done, where the fault itself does not say so."""

    def __str__(self) -> str:
        """As it is typed."""
        given = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        return f"{self.kind}@" + ":".join(f"{name}={value}" for name, value in given.items())
