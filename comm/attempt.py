"""Makes sure that the processes of a run start together. Every attempt to start has a name, with which its keys in the store begin.

A launcher that restarts workers after a failure may give them the same store as before (torchrun does), which still contains the
addresses of dead processes. So rank 0 opens an attempt under a new name, and the other ranks take their seats in it. If a rank's
seat is already taken, that attempt is an old one (or this rank was restarted during it), and the rank waits for the next name. When
all seats are taken, rank 0 lets the ranks begin; a rank that sees earlier that the attempt cannot begin reports the reason to all
ranks.
"""

import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from bagualu.comm.errors import CommunicationError, RecipeError
from bagualu.comm.store import PrefixStore, Store
from bagualu.comm.world import World

_CURRENT = "bagualu/attempt"
_BEGIN, _REFUSED, _BROKEN = "begin", "refused", "broken"
_MOST_NAMED = 8
"""The most missing ranks that the error message of rank 0 lists."""


@dataclass(frozen=True)
class _Attempt:
    name: str
    size: int
    backend: str
    """Name of the backend that rank 0 uses; every rank must use the same."""


class _Seats:
    """The keys of one attempt in the store. Each rank of the attempt has a seat, which only one process can take."""

    def __init__(self, store: Store, attempt: _Attempt) -> None:
        self.attempt = attempt
        self.keys = PrefixStore(f"bagualu/attempts/{attempt.name}", store)

    def take(self, rank: int) -> bool:
        """Takes the seat of `rank` and returns True; returns False if a process has taken that seat before."""
        if self.keys.add(f"seat/{rank}", 1) > 1:
            return False
        self.keys.add("taken", 1)
        return True

    @property
    def all_taken(self) -> bool:
        return int(self.keys.add("taken", 0)) == self.attempt.size

    def free(self) -> list[int]:
        """Returns the ranks whose seats no process has taken."""
        return [rank for rank in range(self.attempt.size) if not self.keys.check([f"seat/{rank}"])]

    def decide(self, decision: str, reason: str = "") -> None:
        """Stores for all ranks whether the attempt begins, is refused or is broken, unless such a decision is stored already."""
        self.keys.compare_set("decision", "", json.dumps([decision, reason]))

    def decision(self) -> tuple[str, str] | None:
        """Returns (decision about the attempt, reason); None if nothing is decided yet. Raises RecipeError if the attempt was
        refused."""
        if not self.keys.check(["decision"]):
            return None
        decision, reason = json.loads(self.keys.get("decision"))
        if decision == _REFUSED:
            raise RecipeError(reason)
        return decision, reason


def join(store: Store, world: World, backend: str, timeout_seconds: float) -> Store:
    """Waits until all `world.size` ranks have joined the same attempt and returns a store for the keys of that attempt.

    `store` is reachable by all ranks and may contain keys of earlier attempts. Raises RecipeError on all ranks if their backends
    differ, and CommunicationError if a rank does not join within `timeout_seconds` or, on rank 0, if a rank was restarted while
    others waited for it.
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
                                   "give the same comm.backend to all ranks")  # fmt: skip
        if not seats.take(world.rank):
            seats.decide(_BROKEN, f"rank {world.rank} was started again while other ranks still waited for it")
        elif _begins(seats, store, deadline):
            return seats.keys
    raise AssertionError("_attempts ends with an error")


def _open(store: Store, attempt: _Attempt, deadline: float, timeout_seconds: float) -> Store:
    """Opens the attempt as rank 0, waits until it begins and returns its store. Raises RecipeError if it is refused,
    CommunicationError if it is broken or ranks are missing at the deadline."""
    seats = _Seats(store, attempt)
    seats.take(0)
    store.set(_CURRENT, json.dumps(asdict(attempt)))
    for _ in _until(deadline):
        if decided := seats.decision():
            if decided[0] == _BROKEN:
                raise CommunicationError(decided[1])
            return seats.keys
        if seats.all_taken:
            seats.decide(_BEGIN)
    missing = seats.free()
    named = ", ".join(map(str, missing[:_MOST_NAMED])) + (", ..." if len(missing) > _MOST_NAMED else "")
    raise CommunicationError(f"{len(missing)} of {attempt.size} ranks have not come within {timeout_seconds:g} s: {named}")


def _attempts(store: Store, deadline: float, timeout_seconds: float) -> Iterator[_Attempt]:
    """Yields the attempt that rank 0 has opened last, again and again. Raises CommunicationError at the deadline."""
    for _ in _until(deadline):
        if store.check([_CURRENT]):
            yield _Attempt(**json.loads(store.get(_CURRENT)))
    raise CommunicationError(f"rank 0 has not begun within {timeout_seconds:g} s")


def _begins(seats: _Seats, store: Store, deadline: float) -> bool:
    """Waits for the decision about the attempt and returns whether the attempt begins. Returns False if it is broken, if rank 0 has
    opened another attempt, or if the deadline has passed. Raises RecipeError if it is refused.

    A broken attempt is no failure of this rank: the attempt may be an old one, of processes that have died and left this rank's
    seat free.
    """
    for _ in _until(deadline):
        if decided := seats.decision():
            return decided[0] == _BEGIN
        if json.loads(store.get(_CURRENT))["name"] != seats.attempt.name:
            return False
    return False


def _until(deadline: float) -> Iterator[None]:
    """Yields immediately and then after increasing pauses (at most 0.2 s) until time.monotonic() has reached `deadline`."""
    pause = 0.005
    yield
    while time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
        yield
