"""The attempts at one step: what each computed, bit for bit, before and after the reduction.

The same weights and samples give the same bits. So a second attempt that differs is a fault of the hardware, on the rank whose
own gradient (not yet mixed with anybody else's) differs; one that does not differ clears the hardware.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bagualu.fault_tolerance.guard.checksum import checksum, combine
from bagualu.fault_tolerance.guard.decide import MOST_ATTEMPTS
from bagualu.fault_tolerance.guard.engine import GuardedEngine


class Attempts:
    """This rank's checksums of the gradient, by attempt."""

    def __init__(self, engine: GuardedEngine) -> None:
        self._engine = engine
        self._own: list[torch.Tensor] = []
        self._made: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        """Of each attempt: own gradient, and the reduced one if asked for; mostly there is nothing to compare it with."""

    def begin(self) -> None:
        """Forget: a new step."""
        self._own.clear()
        self._made.clear()

    def before_reduction(self, gradients: torch.Tensor) -> None:
        """This rank's own `gradients` are complete and nothing has been added to them yet."""
        self._own.append(checksum(gradients))

    def end(self) -> None:
        """After the reduction of an attempt."""
        self._made.append((combine(torch.stack(self._own)), None))
        self._own.clear()
        if self.earlier:
            self.keep()

    def keep(self) -> None:
        """Before the gradient of the newest attempt is overwritten by another one that it is compared with."""
        own, reduced = self._made[-1]
        if reduced is None:
            reduced = combine(torch.stack([checksum(gradients) for gradients in self._engine.reduced_gradients()]))
            self._made[-1] = own, reduced

    @property
    def earlier(self) -> int:
        """Attempts before the newest."""
        return max(0, len(self._made) - 1)

    def differing(self, zero: torch.Tensor) -> list[torch.Tensor]:
        """For each attempt that can come before another: 1 where the newest differs from it, else 0; as scalars like `zero`."""
        before = [(_both(self._made[-1]) != _both(one)).any().to(zero.dtype) for one in self._made[:-1]]
        return [*before, *[torch.zeros_like(zero)] * (MOST_ATTEMPTS - 1 - len(before))]

    def as_json(self) -> list[list[int]]:
        """[own gradient, reduced gradient] by attempt."""
        if self._made:
            self.keep()
        return [_both(one).tolist() for one in self._made]


def _both(attempt: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    own, reduced = attempt
    assert reduced is not None
    return torch.stack([own, reduced])


def culprits(table: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """The ranks whose attempts differ, from what all ranks gave as "attempts".

    Their own gradients count first: a fault in one rank's own makes the reduced ones differ on others. Where layers or stages are
    shared, a fault in an activation spreads to all ranks that compute with it, and all of those are named.
    """
    for which in (0, 1):
        ranks = tuple(rank for rank, row in enumerate(table) if len({attempt[which] for attempt in row["attempts"]}) > 1)
        if ranks:
            return ranks
    return ()
