"""What a rank does is seen from outside as it happens."""

import os
import time
from pathlib import Path

import torch

from bagualu.comm import simulated
from bagualu.comm.group import Communicator
from bagualu.comm.monitor import Line, Monitor, Phase
from bagualu.fault_tolerance.watchdog.heartbeat import Heartbeat, read, read_beats


def test_the_record_follows_the_monitor(tmp_path: Path) -> None:
    monitor = Monitor()
    early = monitor.line(Line("world", (0, 1)))
    monitor.joins(early)  # before anybody looks
    before = time.monotonic()
    Heartbeat(tmp_path, 1, monitor)
    beat = read(tmp_path, 1)
    assert beat is not None
    assert (beat.rank, beat.pid, beat.point, beat.step, beat.steps_begun, beat.operation) == (1, os.getpid(), "start", 0, 0, "")
    assert beat.line is None
    assert before <= beat.since <= time.monotonic()

    monitor.step = 4
    monitor.at(Phase.DATA)
    monitor.step = 5
    monitor.at(Phase.BACKWARD)
    monitor.waits("all_reduce", early, monitor.joins(early))
    beat = read(tmp_path, 1)
    assert beat is not None
    assert (beat.point, beat.step, beat.steps_begun) == ("backward", 5, 2)
    assert (beat.operation, beat.line, beat.number) == ("all_reduce", Line("world", (0, 1)), 2)
    assert beat.counts == {Line("world", (0, 1)): 2}
    assert beat.beats == read_beats(tmp_path, 1)

    beats = beat.beats
    monitor.goes_on()
    beat = read(tmp_path, 1)
    assert beat is not None
    assert beat.line is None
    assert beat.beats == beats + 1


def test_any_number_of_lines_is_counted(tmp_path: Path) -> None:
    monitor = Monitor()
    Heartbeat(tmp_path, 0, monitor)
    lines = [Line("pipeline", (0, rank), messages=True) for rank in range(1, 1500)]
    for times in (1, 2):
        for line in lines:
            index = monitor.line(line)
            assert monitor.joins(index) == times
    monitor.waits("send", index, times)
    beat = read(tmp_path, 0)
    assert beat is not None
    assert beat.counts == dict.fromkeys(lines, 2)
    assert beat.line == lines[-1]
    monitor.at(Phase.FORWARD)  # the record is still where it was
    beat = read(tmp_path, 0)
    assert beat is not None
    assert beat.point == "forward"


def test_what_is_not_there_or_not_whole_is_no_heartbeat(tmp_path: Path) -> None:
    assert read(tmp_path, 0) is None
    assert read_beats(tmp_path, 0) == 0
    monitor = Monitor()
    Heartbeat(tmp_path, 0, monitor)
    path = tmp_path / "rank-00000.beat"
    whole = path.read_bytes()
    path.write_bytes((99).to_bytes(8, "little") + whole[8:])  # as if caught between the two counts
    assert read(tmp_path, 0) is None
    path.write_bytes(whole[:50])
    assert read(tmp_path, 0) is None


def test_a_rank_that_was_replaced_does_not_disturb_its_successor(tmp_path: Path) -> None:
    old, new = Monitor(), Monitor()
    Heartbeat(tmp_path, 0, old)
    Heartbeat(tmp_path, 0, new)
    new.at(Phase.LOAD)
    old.at(Phase.OPTIMIZER)
    beat = read(tmp_path, 0)
    assert beat is not None
    assert beat.point == "load"


def test_collectives_messages_and_waits_of_real_groups_are_told(tmp_path: Path) -> None:
    def rank_main(communicator: Communicator) -> None:
        Heartbeat(tmp_path, communicator.rank, communicator.monitor)
        pair = communicator.group((0, 1), "pair")
        pair.all_reduce(torch.ones(2), asynchronous=True).wait()
        pair.barrier()
        value = torch.ones(1)
        if communicator.rank == 0:
            pair.send(value, 1)
        else:
            pair.receive(value, 0)

    simulated.run(2, rank_main)
    for rank in range(2):
        beat = read(tmp_path, rank)
        assert beat is not None
        assert beat.line is None
        assert beat.counts == {Line("world", (0, 1)): 1, Line("pair", (0, 1)): 3, Line("pair", (0, 1), messages=True): 1}
