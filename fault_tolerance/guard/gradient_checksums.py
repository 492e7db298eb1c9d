"""Checksums of the gradients of each attempt at one step, before and after their reduction.

The same weights and samples give the same bits. So if a second attempt differs, the hardware of the rank whose own gradient (before
the reduction) differs is at fault. If no attempt differs, no hardware is at fault.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bagualu.fault_tolerance.guard.checksum import checksum, combine
from bagualu.fault_tolerance.guard.decide import MOST_ATTEMPTS
from bagualu.fault_tolerance.guard.engine import GuardedEngine


class Attempts:
    """This rank's gradient checksums for each attempt at the current step."""

    def __init__(self, engine: GuardedEngine) -> None:
        self._engine = engine
        self._own: list[torch.Tensor] = []
        self._made: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        """For each attempt, the checksums of this rank's own gradient and of the reduced gradient; the second is None until it is
        needed."""

    def begin(self) -> None:
        """Starts a new step: forgets the attempts at the previous step."""
        self._own.clear()
        self._made.clear()

    def before_reduction(self, gradients: torch.Tensor) -> None:
        """Called when this rank's own `gradients` are complete, before other ranks' gradients are added to them."""
        self._own.append(checksum(gradients))

    def end(self) -> None:
        """Completes the checksums of an attempt. Call this after the attempt's gradients are reduced."""
        self._made.append((_together(self._own), None))
        self._own.clear()
        if self.earlier:
            self.keep()

    def keep(self) -> None:
        """Computes the checksum of the newest attempt's reduced gradient, unless it exists, before another attempt overwrites that
        gradient."""
        own, reduced = self._made[-1]
        if reduced is None:
            reduced = _together([checksum(gradients) for gradients in self._engine.reduced_gradients()])
            self._made[-1] = own, reduced

    @property
    def earlier(self) -> int:
        """The number of attempts at the current step before the newest attempt."""
        return max(0, len(self._made) - 1)

    def differing(self, zero: torch.Tensor) -> list[torch.Tensor]:
        """Returns MOST_ATTEMPTS - 1 scalars like `zero`, one for each earlier attempt: 1 if the newest attempt's checksums on this
        rank differ from it, else 0; also 0 for attempts that were not made."""
        before = [(_both(self._made[-1]) != _both(attempt)).any().to(zero) for attempt in self._made[:-1]]
        return [*before, *[torch.zeros_like(zero)] * (MOST_ATTEMPTS - 1 - len(before))]

    def as_json(self) -> list[list[int]]:
        """Returns [checksum of this rank's own gradient, checksum of the reduced gradient] for each attempt at the current step, in
        order."""
        if self._made:
            self.keep()
        return [_both(attempt).tolist() for attempt in self._made]


def _together(checksums: list[torch.Tensor]) -> torch.Tensor:
    """Returns one checksum for all; 0 for none, on a rank whose parameters are all frozen."""
    return combine(torch.stack(checksums)) if checksums else torch.zeros((), dtype=torch.int64)


def _both(attempt: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    own, reduced = attempt
    assert reduced is not None
    return torch.stack([own, reduced])


def culprits(table: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Returns the ranks whose attempts differ from one another; () if none do. `table` has each rank's `Attempts.as_json` under
    "attempts".

    The ranks' own gradients are compared first, because a fault in a rank's own gradient also changes the reduced gradients of
    other ranks. If an activation with which other ranks compute is wrong (tensor or pipeline parallel), those ranks are named too.
    """
    for which in (0, 1):
        ranks = tuple(rank for rank, row in enumerate(table) if len({attempt[which] for attempt in row["attempts"]}) > 1)
        if ranks:
            return ranks
    return ()
