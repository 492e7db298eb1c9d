"""When the silence of another node's agent ends a generation: when every rank here waits and has been silent as long."""

import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from bagualu.comm.monitor import Line, Monitor, Phase
from bagualu.comm.store import serve
from bagualu.fault_tolerance.watchdog.heartbeat import HEARTBEATS, Heartbeat
from bagualu.launch.workers import rendezvous
from bagualu.launch.workers.lost_node import LostNode, has_begun
from bagualu.launch.workers.rendezvous import SILENT_SECONDS
from bagualu.launch.workers.secret import Seal

ME = {0: os.getpid()}


class Nodes:
    def __init__(self) -> None:
        self.gone: list[str] = []

    def missing(self) -> list[str]:
        return self.gone


class Here:
    """A machine with one rank, and its clock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.nodes, self.now = folder / HEARTBEATS, Nodes(), 0.0
        self.lost = LostNode(self.nodes, folder, lambda: self.now)  # type: ignore[arg-type]
        self.monitor = Monitor()
        Heartbeat(self.folder, 0, self.monitor)
        assert self.lost.look(ME) is None

    def later(self, seconds: float = SILENT_SECONDS):
        self.now += seconds
        return self.lost.look(ME)

    def step(self, number: int) -> None:
        self.monitor.step = number
        self.monitor.at(Phase.FORWARD)

    def wait(self) -> None:
        line = self.monitor.line(Line("world", (0, 1)))
        self.monitor.waits("all_reduce", line, self.monitor.joins(line))


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


def test_a_slow_start_is_nobodys_end_as_long_as_all_agents_beat(here: Here) -> None:
    assert here.later(10_000) is None


def test_who_waits_to_be_connected_to_a_node_that_is_gone_is_ended_and_told_of_it(here: Here) -> None:
    here.nodes.gone = ["10.0.0.7"]
    assert here.later(SILENT_SECONDS - 1) is None
    failure = here.later(1)
    assert failure is not None
    assert (failure.rank, failure.phase, failure.kind) == (-1, "start", "peer")
    assert failure.cause.startswith("node 10.0.0.7 is gone: ")


def test_so_is_who_waits_in_a_step_but_not_who_computes_there_or_comes_on(here: Here) -> None:
    here.nodes.gone = ["10.0.0.7"]
    here.step(7)
    assert here.later(0) is None
    assert here.later(1000) is None
    here.wait()
    assert here.later() is None  # it has just begun to wait
    failure = here.later()
    assert failure is not None
    assert (failure.phase, failure.step) == ("step 7", 7)
    here.monitor.goes_on()
    assert here.later() is None


def test_the_workers_of_another_generation_have_not_waited_yet(here: Here) -> None:
    here.later(1000)
    here.nodes.gone = ["10.0.0.7"]
    assert here.lost.look({0: os.getppid()}) is None


def test_nothing_is_to_be_saved_until_a_rank_has_begun_a_step(here: Here) -> None:
    assert not has_begun(here.folder, 0, os.getpid())
    assert not has_begun(here.folder, 1, os.getpid())
    here.step(1)
    assert has_begun(here.folder, 0, os.getpid())
    assert not has_begun(here.folder, 0, os.getppid())  # left by another process


def test_an_agent_that_was_held_up_is_heard_again(monkeypatch) -> None:
    monkeypatch.setattr(rendezvous, "_MISSED_HEARTBEATS", 2)
    hosted = serve("127.0.0.1", 0, timedelta(seconds=60))
    stores = [hosted, TCPStore("127.0.0.1", hosted.port, is_master=False)]
    places = [
        rendezvous._rendezvous_store(
            store, store is hosted, "127.0.0.1", f"127.0.0.{number}", Seal("secret", "blip"), "blip", 2, 2, 60, 1
        )
        for number, store in enumerate(stores, 1)
    ]
    here, there = (place.handler for place in places)
    meeting = [threading.Thread(target=handler.next_rendezvous) for handler in (here, there)]
    for thread in meeting:
        thread.start()
    for thread in meeting:
        thread.join(60)
    assert here.missing() == []
    with there._heartbeat_lock:
        _until(lambda: here.missing() == ["127.0.0.2"])
    _until(lambda: here.missing() == [])
    time.sleep(3)  # and it goes on beating
    assert here.missing() == []
    for handler in (here, there):
        handler.shutdown()


def _until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
