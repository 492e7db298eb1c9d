"""Which processes begin together: every attempt to train has a name of its own, and keeps its keys under that name.

A launcher that starts workers again after a death may give them the store of the dead (torchrun does), with the addresses of the
dead in it. So rank 0 opens an attempt under a name that was never used, and the other ranks take their seats in it. A rank that
finds its own seat taken has read the name of an attempt that is over, and waits for the next name. When all seats are taken,
rank 0 lets the ranks begin; a rank that sees before that the attempt cannot begin says so to all of them.
"""

import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from torch._C._distributed_c10d import PrefixStore, Store

from bagualu.comm.errors import CommunicationError, RecipeError
from bagualu.comm.world import World

_CURRENT = "bagualu/attempt"
_BEGIN, _REFUSED, _BROKEN = "begin", "refused", "broken"
_MOST_NAMED = 8
"""Ranks that a message names."""


@dataclass(frozen=True)
class _Attempt:
    name: str
    size: int
    backend: str
    """Of rank 0, as are the others."""


class _Seats:
    """The keys of one attempt."""

    def __init__(self, store: Store, attempt: _Attempt) -> None:
        self.attempt = attempt
        self.keys = PrefixStore(f"bagualu/attempts/{attempt.name}", store)

    def take(self, rank: int) -> bool:
        """Take the seat of `rank`; False when a process has it already."""
        if self.keys.add(f"seat/{rank}", 1) > 1:
            return False
        self.keys.add("taken", 1)
        return True

    @property
    def all_taken(self) -> bool:
        return int(self.keys.add("taken", 0)) == self.attempt.size

    def free(self) -> list[int]:
        return [rank for rank in range(self.attempt.size) if not self.keys.check([f"seat/{rank}"])]

    def decide(self, decision: str, reason: str = "") -> None:
        """Say to all ranks what becomes of the attempt. The first decision stands."""
        self.keys.compare_set("decision", "", json.dumps([decision, reason]))

    def decided(self) -> bool:
        """Whether the attempt begins; False: that is still open.

        Raises RecipeError or CommunicationError when it was given up.
        """
        if not self.keys.check(["decision"]):
            return False
        decision, reason = json.loads(self.keys.get("decision"))
        if decision == _REFUSED:
            raise RecipeError(reason)
        if decision == _BROKEN:
            raise CommunicationError(reason)
        return True


def join(store: Store, world: World, backend: str, timeout_seconds: float) -> Store:
    """The keys of the attempt that `world.size` ranks make together, once all of them are there.

    `store` is the one that all of them reach, perhaps with keys of earlier attempts. Raises RecipeError on all ranks where their
    backends differ, and CommunicationError when a rank does not come in time.
    """
    deadline = time.monotonic() + timeout_seconds
    if world.rank == 0:
        return _open(store, _Attempt(secrets.token_hex(8), world.size, backend), deadline, timeout_seconds)
    over: set[str] = set()
    for attempt in _attempts(store, deadline, timeout_seconds):
        if attempt.name in over or attempt.size != world.size:
            continue
        over.add(attempt.name)
        seats = _Seats(store, attempt)
        if attempt.backend != backend:
            seats.decide(_REFUSED, f"rank 0 has comm.backend={attempt.backend} and rank {world.rank} has comm.backend={backend}; "
                                   "give the same comm.backend to all of them")  # fmt: skip
        if not seats.take(world.rank):
            seats.decide(_BROKEN, f"rank {world.rank} was started again while other ranks still waited for it")
        elif _begins(seats, store, deadline):
            return seats.keys
    raise AssertionError("attempts end with an error")


def _open(store: Store, attempt: _Attempt, deadline: float, timeout_seconds: float) -> Store:
    """Rank 0's part."""
    seats = _Seats(store, attempt)
    seats.take(0)
    store.set(_CURRENT, json.dumps(asdict(attempt)))
    for _ in _until(deadline):
        if seats.decided():
            return seats.keys
        if seats.all_taken:
            seats.decide(_BEGIN)
    missing = seats.free()
    named = ", ".join(map(str, missing[:_MOST_NAMED])) + (", ..." if len(missing) > _MOST_NAMED else "")
    raise CommunicationError(f"{len(missing)} of {attempt.size} ranks have not come within {timeout_seconds:g} s: {named}")


def _attempts(store: Store, deadline: float, timeout_seconds: float) -> Iterator[_Attempt]:
    """The current attempt, again and again."""
    for _ in _until(deadline):
        if store.check([_CURRENT]):
            yield _Attempt(**json.loads(store.get(_CURRENT)))
    raise CommunicationError(f"rank 0 has not begun within {timeout_seconds:g} s")


def _begins(seats: _Seats, store: Store, deadline: float) -> bool:
    """Wait until the attempt begins; False when rank 0 has opened another attempt, or time is up."""
    for _ in _until(deadline):
        if seats.decided():
            return True
        if json.loads(store.get(_CURRENT))["name"] != seats.attempt.name:
            return False
    return False


def _until(deadline: float) -> Iterator[None]:
    """Come back ever less often until the deadline; at least once."""
    pause = 0.005
    yield
    while time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
        yield
