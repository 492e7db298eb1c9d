"""Ranks that stand still in one process: those that wait are told, the one that does not is left behind."""

import threading
import time

import pytest

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
