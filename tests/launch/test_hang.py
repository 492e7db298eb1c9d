"""A run of real workers in which one stands still: it ends by itself, and the last words name that one and nobody else."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.standing import assert_names_rank_phase_and_cause

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(300)]
LAST = "bagualu: failed: "
HANG = ("restart.hang_seconds=3", "restart.long_hang_seconds=60", "restart.backoff_seconds=0")


def stand_still(start, *overrides, limit=0):
    return start(*HANG, f"restart.limit={limit}", *overrides, entrypoint="stand_still:train")


def named(line, beginning):
    """The rank that a line names, why, and the report it points to."""
    if beginning == LAST:
        assert_names_rank_phase_and_cause(line)
    found = re.match(beginning + r"rank (\d+)(?: failed)?, step \d+: the run stood still: (.*); report: (\S+);", line)
    assert found, line
    return int(found[1]), found[2], Path(found[3]).read_text()


def stack_of(report, rank):
    return report.split(f"stack of rank {rank}\n")[1].split("stack of rank")[0]


def test_a_stopped_rank_is_named_with_its_stack_and_the_run_goes_on_without_that_process(start, gone):
    run = stand_still(start, "train.steps=100", limit=1)
    ranks = run.started(step=5)
    os.kill(ranks[1]["pid"], signal.SIGSTOP)
    code, _, err = run.end()
    assert code == 0, err
    line = next(line for line in err.splitlines() if "restart 1 of 1" in line)
    rank, why, report = named(line, "bagualu: ")
    assert rank == 1
    assert "stopped" in why
    assert "rank 0" not in why
    assert "rank 2" not in why
    assert "culprit: rank 1\n" in report
    assert "in train" in stack_of(report, 1)
    for other in (0, 2, 3):
        assert re.search(f"rank {other}: waits for all_reduce number", report)
        assert "in train" in stack_of(report, other)
    assert gone([one["pid"] for one in ranks])


@pytest.mark.parametrize(("how", "where"), [("lock", "native_deadlock"), ("gil", "keeps_the_lock")])
def test_a_rank_that_does_not_come_on_is_named_with_its_stack(start, gone, how, where):
    run = stand_still(start, f"run.name={how}")
    ranks = run.started(step=3)
    code, _, err = run.end()
    rank, _, report = named(err.splitlines()[-1], LAST)
    assert code == 1
    assert rank == 2
    assert where in stack_of(report, 2)
    assert gone([one["pid"] for one in ranks])


def test_a_rank_that_stands_still_where_much_is_allowed_is_named_before_the_others_give_up(start):
    run = stand_still(start, "run.name=first", "comm.backend=simulated", "comm.timeout_seconds=6")
    code, _, err = run.end()
    rank, _, report = named(err.splitlines()[-1], LAST)
    assert code == 1
    assert rank == 2
    assert "computes_for_ever" in stack_of(report, 2)


def test_what_may_take_long_is_no_hang(start):
    code, _, err = stand_still(start, "run.name=slow", "train.steps=10").end()
    assert code == 0, err


def test_a_rank_that_runs_as_a_thread_is_found_in_the_same_way(start):
    code, _, err = stand_still(start, "run.name=spin", "comm.backend=simulated").end()
    rank, _, report = named(err.splitlines()[-1], LAST)
    assert code == 1
    assert rank == 2
    assert "computes_for_ever" in stack_of(report, 2)
    assert "in train" in stack_of(report, 0)
