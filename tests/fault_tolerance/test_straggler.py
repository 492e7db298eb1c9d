"""The slow rank is flagged, with its figures; noise, uneven stages and experts with more tokens are not slowness."""

import contextlib
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bagualu.comm.group import Communicator
from bagualu.comm.monitor import Phase
from bagualu.fault_tolerance.config import StragglerConfig
from bagualu.fault_tolerance.straggler import Judge, Stragglers, Window, WorkClock, median_without
from bagualu.parallel.layout import Layout
from bagualu.parallel.mesh import Mesh
from tests.harness import run


def noisy(random: random.Random, work: float, tails: float) -> float:
    """Own seconds of a window of 20 steps of `work` seconds: uneven steps, and now and then one that takes very long."""
    steps = (work * random.lognormvariate(0, 0.3) for _ in range(20))
    return sum(step + (work * random.paretovariate(1.5) if random.random() < tails else 0) for step in steps)


def windows(random: random.Random, work: list[float], tails: float) -> dict[int, Window]:
    own = [noisy(random, one, tails) for one in work]
    return {rank: Window(one, one, 1.1 * max(own)) for rank, one in enumerate(own)}


@given(st.integers(0, 2**32), st.integers(2, 16), st.sampled_from([0.0, 0.01, 0.02]))
@settings(max_examples=60, derandomize=True)  # noise without a variance fools every judge now and then
def test_noise_with_heavy_tails_flags_nobody(seed: int, ranks: int, tails: float) -> None:
    source = random.Random(seed)
    judge = Judge(1.5)
    for window in range(100):  # 2000 steps
        judge.add(20 * window, 20, windows(source, [1.0] * ranks, tails))
    assert judge.history == []


@given(st.integers(0, 2**32), st.integers(2, 16), st.floats(2.0, 10.0), st.data())
@settings(max_examples=60, derandomize=True)  # noise without a variance fools every judge now and then
def test_a_slow_rank_is_flagged_within_a_few_windows_and_cleared_when_it_has_recovered(
    seed: int, ranks: int, factor: float, data: st.DataObject
) -> None:
    slow = data.draw(st.integers(0, ranks - 1))
    source, judge = random.Random(seed), Judge(1.5)
    step = 0

    def several(count: int, work: list[float]) -> None:
        nonlocal step
        for _ in range(count):
            step += 20
            judge.add(step, 20, windows(source, work, 0.01))

    several(10, [1.0] * ranks)
    several(5, [factor if rank == slow else 1.0 for rank in range(ranks)])
    assert [one.rank for one in judge.flagged] == [slow]
    assert 10 * 20 < judge.flagged[0].since_step <= 15 * 20
    assert judge.flagged[0].ratio > 1.5
    several(10, [1.0] * ranks)
    assert judge.flagged == []
    assert [one.rank for one in judge.history] == [slow]


class Slow(WorkClock):
    """A clock on which every step takes this rank `seconds` of its own work."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def lap(self) -> tuple[float, float]:
        return self._seconds, self._seconds


def judged(communicator: Communicator) -> tuple[list[tuple[int, int]], list[int], list[dict[str, Any]]]:
    """Steps of 8 ranks, of which the second stage has three times as much work, the second experts twice as much, and rank 6, in
    the second half, five times; (step, rank) of those that become slow, the peers' ranks, and what is known at the end."""
    layout, rank = Layout(pipeline=2, data=4, expert=2), communicator.rank
    mesh = Mesh.build(layout, communicator)
    stragglers = Stragglers(StragglerConfig(window_seconds=1e-9), communicator.world, [mesh.group("tensor"), mesh.group("replica")])
    work = (3.0 if rank >= 4 else 1.0) * (2.0 if rank % 2 else 1.0)
    found = []
    for step in range(1, 101):
        stragglers._clock = Slow(work * (5.0 if rank == 6 and step > 50 else 1.0))
        found += [(step, one.rank) for one in stragglers.after_step(step, 40.0)]
    return found, sorted(stragglers._exchange()), stragglers.ever()


def test_only_ranks_that_do_the_same_work_are_compared_and_all_hear_of_slow_ones() -> None:
    results = run("simulated", 8, judged)
    assert [peers for _, peers, _ in results] == [[0, 2], [1, 3], [0, 2], [1, 3], [4, 6], [5, 7], [4, 6], [5, 7]]
    assert {tuple(found) for found, _, _ in results} == {((70, 6),)}
    (known,) = results[0][2]
    assert (known["rank"], known["ratio"], known["own_seconds"], known["peer_seconds"]) == (6, 5.0, 15.0, 3.0)
    assert all(told == [known] for _, _, told in results)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=12), st.data())
def test_a_rank_is_compared_with_the_median_of_the_others(times: list[float], data: st.DataObject) -> None:
    left_out = data.draw(st.integers(0, len(times) - 1))
    others = [time for index, time in enumerate(times) if index != left_out]
    assert median_without(sorted(times), times[left_out]) == pytest.approx(median(others))


def test_slowness_that_costs_next_to_nothing_is_none() -> None:
    judge = Judge(1.5)
    for window in range(10):
        judge.add(window, 1, {0: Window(0.001, 0.001, 1.0), 1: Window(0.004, 0.004, 1.0)})
    assert judge.history == []


def test_the_evidence_tells_a_stopped_process_from_one_with_more_to_do() -> None:
    judge = Judge(1.5)
    for window in range(4):
        changed = judge.add(window, 10, {0: Window(1, 1, 3), 1: Window(3, 1, 3), 2: Window(1, 1, 3)})
    assert [one.rank for one in changed] == [1]
    assert str(changed[0]) == ("rank 1 is slow: 0.3 s of its own work a step, its peers 0.1 s (3.0x), on a processor 33% of that "
                               "time, its peers 100%")  # fmt: skip


def test_own_time_is_the_step_without_its_waits() -> None:
    now = 0.0
    clock = WorkClock(lambda: now, lambda: now / 2)

    def wait_until(time: float) -> None:
        nonlocal now
        now = time

    wait_until(5)
    clock.waits("barrier in world")  # between steps nothing counts
    wait_until(6)
    clock.waits(None)
    clock.at(Phase.DATA, 1)
    wait_until(8)
    clock.at(Phase.FORWARD, 1)
    clock.waits("all_reduce in fold")
    wait_until(20)
    clock.waits(None)
    wait_until(21)
    assert clock.lap() == (3.0, 1.5)
    wait_until(50)
    clock.at(Phase.VALIDATE, 1)
    wait_until(60)
    assert clock.lap() == (0.0, 0.0)


CONFIG = StragglerConfig(window_seconds=0.5)


def steps(communicator: Communicator, folder: str, seconds: float, until_flagged: bool) -> list[tuple[int, int]]:
    """Runs steps of about 5 ms of work each, until rank 0 has done so for `seconds`. Returns (step, rank) for each rank that is
    flagged as slow."""
    (Path(folder) / f"{communicator.rank}.pid").write_text(str(os.getpid()))
    monitor, found = communicator.monitor, []
    stragglers = Stragglers(CONFIG, communicator.world, [communicator.world])
    matrix, elapsed, begun, step = torch.ones(200, 200), torch.zeros(1), time.perf_counter(), 0
    while elapsed < seconds:
        started, step = time.perf_counter(), step + 1
        monitor.step = step
        monitor.at(Phase.DATA)
        for _ in range(20):
            matrix = (matrix @ matrix).clamp(0, 1)
        elapsed.fill_(started - begun if communicator.rank == 0 else 0.0)
        communicator.world.all_reduce(elapsed)
        found += [(step, one.rank) for one in stragglers.after_step(step, time.perf_counter() - started)]
        if until_flagged and found:
            break
    monitor.observers.clear()
    return found


def test_a_clean_run_flags_nobody(tmp_path: Path) -> None:
    assert run("gloo", 4, steps, str(tmp_path), 5.0, False) == [[]] * 4


@pytest.mark.skipif(sys.platform != "linux", reason="stops a process by a signal")
def test_a_rank_that_is_stopped_again_and_again_is_flagged(tmp_path: Path) -> None:
    ended = threading.Event()

    def hold_up() -> None:
        while not ended.is_set():
            with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
                pid = int((tmp_path / "2.pid").read_text())
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.06)
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.03)

    thread = threading.Thread(target=hold_up)
    thread.start()
    try:
        found = run("gloo", 4, steps, str(tmp_path), 60.0, True)
    finally:
        ended.set()
        thread.join()
    assert found == [found[0]] * 4  # everybody knows, at the same step
    assert [rank for _, rank in found[0]] == [2]
