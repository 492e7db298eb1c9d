"""Which processes begin together, in a store that may hold what earlier attempts have left."""

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore, Store

from bagualu.comm.attempt import join
from bagualu.comm.errors import CommunicationError, RecipeError
from bagualu.comm.world import World

LONG, SHORT = 60.0, 0.3


class Rank(threading.Thread):
    """A rank that joins, on a thread of its own."""

    def __init__(self, store: Store, rank: int, size: int, backend: str = "gloo", timeout: float = LONG) -> None:
        super().__init__(daemon=True)
        self.arguments = store, World(rank, size), backend, timeout
        self.found: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.found = join(*self.arguments)
        except Exception as error:
            self.found = error

    def result(self) -> Any:
        self.join(LONG)
        return self.found


def same(ranks: list[Rank]) -> bool:
    """Whether these ranks have the same keys."""
    found = [rank.result() for rank in ranks]
    found[0].set("probe", str(id(ranks)))
    return all(keys.get("probe") == str(id(ranks)).encode() for keys in found)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def current(store: Store) -> Any:
    return json.loads(store.get("bagualu/attempt"))["name"] if store.check(["bagualu/attempt"]) else None


@pytest.fixture
def store() -> Store:
    store = HashStore()
    store.set_timeout(timedelta(seconds=LONG))
    return store


def test_ranks_that_come_in_any_order_begin_together(store: Store) -> None:
    ranks = [Rank(store, rank, 3) for rank in (2, 1)]
    assert same([*ranks, Rank(store, 0, 3)])


def test_a_second_attempt_has_none_of_the_keys_of_the_first(store: Store) -> None:
    first = [Rank(store, rank, 2) for rank in (0, 1)]
    assert same(first)
    again = Rank(store, 1, 2)  # before rank 0: it reads the name of the first attempt
    second = [Rank(store, 0, 2), again]
    assert same(second)
    assert not second[0].found.check(["seat-of-the-first"])
    first[0].found.set("seat-of-the-first", "")
    assert not again.found.check(["seat-of-the-first"])


def test_a_rank_that_died_before_it_came_does_not_tie_the_next_one_to_the_dead(store: Store) -> None:
    dead = Rank(store, 0, 3, timeout=SHORT)
    assert isinstance(dead.result(), CommunicationError)
    early = [Rank(store, rank, 3) for rank in (1, 2)]  # which take free seats beside the dead
    time.sleep(0.1)
    assert same([*early, Rank(store, 0, 3)])


def test_an_attempt_of_another_size_is_over(store: Store) -> None:
    assert same([Rank(store, rank, 2) for rank in (0, 1)])
    more = [Rank(store, rank, 4) for rank in (1, 2, 3)]
    assert same([*more, Rank(store, 0, 4)])


def test_a_rank_started_again_while_others_wait_for_the_third_ends_the_attempt(store: Store) -> None:
    waits, dies = Rank(store, 0, 3), Rank(store, 1, 3, timeout=SHORT)
    assert isinstance(dies.result(), CommunicationError)
    again = Rank(store, 1, 3)
    assert "rank 1 was started again" in str(waits.result())
    late = Rank(store, 2, 3)  # it finds a free seat in the attempt that is over
    time.sleep(0.1)
    assert same([Rank(store, 0, 3), late, again])


def test_a_free_seat_beside_the_dead_is_no_failure_when_another_rank_finds_its_own_taken(store: Store) -> None:
    dead = [Rank(store, 0, 3, timeout=SHORT), Rank(store, 1, 3, timeout=SHORT)]
    assert all(isinstance(rank.result(), CommunicationError) for rank in dead)
    free = Rank(store, 2, 3)
    until(lambda: store.check([f"bagualu/attempts/{current(store)}/seat/2"]))
    taken = Rank(store, 1, 3)
    time.sleep(0.3)
    assert same([Rank(store, 0, 3), free, taken])


def test_ranks_with_different_backends_are_refused_on_all_of_them(store: Store) -> None:
    ranks = [Rank(store, 0, 3), Rank(store, 1, 3), Rank(store, 2, 3, "nccl")]
    for rank in ranks:
        assert isinstance(rank.result(), RecipeError), rank.result()
        assert "rank 0 has comm.backend=gloo and rank 2 has comm.backend=nccl; give the same" in str(rank.result())


def test_who_has_not_come_is_named(store: Store) -> None:
    ranks = [Rank(store, 0, 4, timeout=SHORT), Rank(store, 2, 4, timeout=SHORT)]
    assert "2 of 4 ranks have not come within 0.3 s: 1, 3" in str(ranks[0].result())
    assert isinstance(ranks[1].result(), CommunicationError)


def test_without_rank_0_the_others_say_so(store: Store) -> None:
    assert "rank 0 has not begun within 0.3 s" in str(Rank(store, 1, 2, timeout=SHORT).result())
