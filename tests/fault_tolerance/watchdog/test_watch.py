"""How long is too long: silence is counted over looks at the heartbeats."""

import os
import time
from pathlib import Path

from bagualu.comm.monitor import Line, Monitor, Phase
from bagualu.fault_tolerance.watchdog.heartbeat import Heartbeat
from bagualu.fault_tolerance.watchdog.verdict import HangDiagnosis, Patience
from bagualu.fault_tolerance.watchdog.watch import Watchdog


class World:
    """Heartbeats of two ranks of this process, and a clock that the test moves."""

    def __init__(self, folder: Path, started: float = 0.0) -> None:
        self.time = started
        self.monitors = [Monitor(), Monitor()]
        self.watchdog = Watchdog(folder, dict.fromkeys(range(2), os.getpid()), Patience(10, 60), lambda: self.time)
        for rank, monitor in enumerate(self.monitors):
            Heartbeat(folder, rank, monitor)

    def come_on(self, *ranks: int, steps: int = 3) -> None:
        for rank in ranks:
            for _ in range(steps):
                self.monitors[rank].step += 1
                self.monitors[rank].at(Phase.FORWARD)

    def pass_time(self, seconds: float, *beating: int) -> HangDiagnosis | None:
        """The first verdict within `seconds`, while some ranks go on."""
        for _ in range(round(seconds)):
            self.time += 1
            self.come_on(*beating, steps=1)
            if verdict := self.watchdog.look():
                return verdict
        return None


def test_a_rank_that_comes_on_is_left_alone_and_one_that_does_not_is_found_in_time(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.come_on(0, 1)
    assert world.pass_time(100, 0, 1) is None
    assert world.pass_time(9, 0) is None
    found = world.pass_time(2, 0)
    assert found is not None
    assert found.culprits == (1,)
    assert "at forward of step 103, 1" in found.why


def test_a_rank_that_has_not_begun_has_long_patience(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.come_on(0)
    assert world.pass_time(59, 0) is None
    found = world.pass_time(3, 0)
    assert found is not None
    assert found.culprits == (1,)


def test_the_time_in_which_the_watchdog_itself_was_stopped_counts_for_nobody(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.come_on(0, 1)
    world.pass_time(5, 0)
    world.time += 3600
    assert world.watchdog.look() is None
    assert world.pass_time(3, 0) is None
    assert world.pass_time(5, 0) is not None


def test_how_long_a_rank_has_waited_is_read_from_the_clock_by_which_it_gives_up(tmp_path: Path) -> None:
    """Also while the watchdog could not look."""
    world = World(tmp_path)
    world.come_on(0, 1)
    waits = world.monitors[0]
    waits.waits("all_reduce", line := waits.line(Line("world", (0, 1))), waits.joins(line))
    time.sleep(0.05)
    seen = world.watchdog.seen()
    assert seen[0].waited_seconds >= 0.05
    assert (seen[0].silent_seconds, seen[1].waited_seconds) == (0, 0)
    waits.goes_on()
    assert world.watchdog.seen()[0].waited_seconds == 0


def test_looking_more_often_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.come_on(0, 1)
    for _ in range(500):
        world.time += 0.01
        assert world.watchdog.look() is None
    assert world.pass_time(4, 0) is None
    assert world.pass_time(3, 0) is not None


def test_the_heartbeats_of_the_generation_before_say_nothing(tmp_path: Path) -> None:
    before = World(tmp_path)
    before.come_on(0, 1)
    now = World.__new__(World)
    now.time, now.monitors = 0.0, before.monitors
    now.watchdog = Watchdog(tmp_path, dict.fromkeys(range(2), os.getppid()), Patience(10, 60), lambda: now.time)
    assert now.pass_time(30) is None
    assert {one.point for one in now.watchdog.seen().values()} == {"start"}
