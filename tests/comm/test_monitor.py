"""What a rank is doing is seen by whoever observes it, at the moment it happens."""

import re
from pathlib import Path

import pytest
import torch

from bagualu.comm import simulated
from bagualu.comm.monitor import Phase
from bagualu.fault_tolerance.ledger.totals import PHASES


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
        communicator.monitor.at(Phase.REDUCE)
        work = communicator.world.all_reduce(torch.ones(2), asynchronous=True)
        communicator.monitor.at(Phase.AGREE)
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
        communicator.monitor.at(Phase.OPTIMIZER)

    with pytest.raises(ZeroDivisionError, match="at optimizer of step 0"):
        simulated.run(2, rank_main)


def test_every_phase_is_reported_somewhere_and_has_its_place_in_the_ledger():
    root = Path(__file__).parents[2]
    sources = [path.read_text() for folder in ("parallel", "fault_tolerance", "trainer") for path in (root / folder).rglob("*.py")]
    calls = [call for text in sources for call in re.findall(r"monitor\.at\((.*)\)", text)]
    assert {name for call in calls for name in re.findall(r"Phase\.(\w+)", call)} == {phase.name for phase in Phase}
    assert {phase.activity for phase in Phase} <= {*PHASES, "discarded"}
