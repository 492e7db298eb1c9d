"""Ranks that stand still in one process: those that wait are told, the one that does not is left behind."""

import threading
import time

import pytest
import torch

from bagualu.comm import simulated
from bagualu.comm.errors import CommunicationError
from bagualu.comm.group import Communicator


def test_a_rank_that_never_comes_does_not_keep_the_others_nor_the_caller() -> None:
    free, told = threading.Event(), dict[int, str]()

    def rank_main(communicator: Communicator) -> None:
        if communicator.rank == 1:
            free.wait()
        try:
            communicator.world.barrier()
        except CommunicationError as error:
            told[communicator.rank] = str(error)
            raise

    asked = 0

    def hung() -> str | None:
        nonlocal asked
        asked += 1
        return "rank 1 stands still" if asked > 3 else None

    with pytest.raises(CommunicationError, match="rank 1 stands still"):
        simulated.run(3, rank_main, hung=hung)
    assert told == {0: "rank 1 stands still", 2: "rank 1 stands still"}
    free.set()
    while 1 not in told:  # it comes too late, and changes nothing
        time.sleep(0.01)
    assert told[1] == "rank 1 stands still"


def test_the_error_that_came_first_is_raised_though_its_thread_ends_last() -> None:
    def rank_main(communicator: Communicator) -> None:
        if communicator.rank == 1:
            while not communicator.given_up():
                time.sleep(0.001)
            raise CommunicationError("a consequence")
        try:
            communicator.world.barrier()
        except CommunicationError:
            gone.wait()
            raise

    gone, before = threading.Event(), threading.active_count()
    with pytest.raises(CommunicationError, match=r"has waited 0.05 s for ranks \[1\]"):
        simulated.run(2, rank_main, 0.05, hung=lambda: gone.set() if threading.active_count() < before + 2 else None)


class Busy:
    """In place of a rank's thread: it goes on until `clock` is at the time `until`; waiting for it moves that clock."""

    clock = 0.0

    def __init__(self, until: float) -> None:
        self.until = until

    def is_alive(self) -> bool:
        return Busy.clock < self.until

    def join(self, timeout: float) -> None:
        Busy.clock += timeout


def test_ranks_are_looked_at_equally_often_however_many_there_are() -> None:
    looks = 0

    def hung() -> None:
        nonlocal looks
        looks += 1

    simulated._join([Busy(1.0) for _ in range(100)], simulated.Hub(100, 1.0, torch.device("cpu")), hung)  # type: ignore[arg-type]
    assert looks >= 20
