"""What a rank is doing is seen by whoever observes it, at the moment it happens."""

import pytest
import torch

from bagualu.comm import simulated


class Notes:
    def __init__(self):
        self.seen = []

    def at(self, point, step):
        self.seen.append((point, step))

    def waits(self, what):
        self.seen.append(what)


def test_points_and_waits_are_told_in_order():
    def rank_main(communicator):
        notes = Notes()
        communicator.monitor.observers.append(notes)
        communicator.monitor.step = 3
        communicator.monitor.at("reduce")
        work = communicator.world.all_reduce(torch.ones(2), asynchronous=True)
        communicator.monitor.at("agree")
        work.wait()
        communicator.group((0, 1), "pair").barrier()
        return communicator.monitor.point, notes.seen

    for point, seen in simulated.run(2, rank_main):
        assert point == "agree"
        assert seen == [("reduce", 3), ("agree", 3), "all_reduce in world", None,
                        "connect in pair", None, "barrier in pair", None]  # fmt: skip


def test_an_observer_may_end_the_rank():
    class Ends(Notes):
        def at(self, point, step):
            raise ZeroDivisionError(f"at {point} of step {step}")

    def rank_main(communicator):
        communicator.monitor.observers.append(Ends())
        communicator.monitor.at("optimizer")

    with pytest.raises(ZeroDivisionError, match="at optimizer of step 0"):
        simulated.run(2, rank_main)
