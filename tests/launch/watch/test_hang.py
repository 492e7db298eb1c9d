"""A run in which one rank stands still: the words name that one and nobody else, and the run goes on as if nothing had been."""

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import leaving_nothing
from tests.launch.conftest import starting
from tests.launch.survival import FOUR, MOST_LOST, SMALL, finish, small
from tests.standing import assert_names_rank_phase_and_cause, assert_stood

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(300)]
LAST = "bagualu: failed: "
HANG = ("restart.hang_seconds=3", "restart.long_hang_seconds=60")


@pytest.fixture(scope="module")
def reference(undisturbed, tmp_path_factory):
    """Returns a function from a backend to its undisturbed run. Backends sum over four ranks in different orders."""
    return lambda backend: undisturbed(small(tmp_path_factory.mktemp("unused"), *FOUR), backend)


def stand_still(start, name, *words, limit=0, hang=HANG):
    own = [f"run.name={name}", f"restart.limit={limit}", "restart.backoff_seconds=0"]
    return start(*SMALL, *FOUR, *own, *hang, *words, entrypoint="faulty:train")


def named(line, beginning):
    """The rank that a line names, why, and the report it points to."""
    if beginning == LAST:
        assert_names_rank_phase_and_cause(line)
    found = re.match(beginning + r"rank (\d+)(?: failed)?, step \d+: the run stood still: (.*); report: (\S+);", line)
    assert found, line
    return int(found[1]), found[2], Path(found[3]).read_text()


def stack_of(report, rank):
    return report.split(f"stack of rank {rank}\n")[1].split("stack of rank")[0]


def test_each_rank_that_stands_still_is_named_with_its_stack_and_the_run_goes_on(start, reference):
    """One after the other: stopped; in a native dead lock; one that keeps Python's lock too."""
    run = stand_still(start, "freeze-1-3-forward.lock-2-5-backward.gil-3-7-forward", limit=3)
    code, _, err = run.end(120)
    assert code == 0, err
    lines = [line for line in err.splitlines() if re.search("restart [123] of 3", line)]
    found = [named(line, "bagualu: ") for line in lines]
    assert [rank for rank, *_ in found] == [1, 2, 3], err
    _, why, report = found[0]
    assert "stopped" in why
    assert not re.search("rank [023]", why)
    assert "culprit: rank 1\n" in report
    for rank in (0, 2, 3):
        assert re.search(f"rank {rank}: waits for ", report)
        assert "in train" in stack_of(report, rank)
    where = ["freeze", "native_deadlock", "keeps_the_lock"]
    assert [where[index] in stack_of(report, rank) for index, (rank, _, report) in enumerate(found)] == [True] * 3
    assert_stood(run.folder, reference("gloo"), MOST_LOST)


THREADS = ("comm.backend=simulated",)
RUNS: dict[str, dict[str, Any]] = {
    "thread": {"words": ("hold-2-1-forward", *THREADS, "comm.timeout_seconds=8")},
    "unwatched": {"words": ("hold-2-5-forward", "comm.timeout_seconds=8"), "hang": ["restart.hang_seconds=0"]},
    "long": {"words": ("nap-2-1-forward.nap-2-4-validate",)},
}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Runs that do little but wait, by name, all under way at once."""
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(leaving_nothing(tmp_path_factory.mktemp("together")))
        runs = {}
        for name, options in RUNS.items():
            start = stack.enter_context(starting(tmp_path_factory.mktemp(name), watch))
            runs[name] = stand_still(start, *options["words"], hang=options.get("hang", HANG))
        yield runs


def test_a_rank_that_runs_as_a_thread_is_found_in_the_same_way(together, reference):
    """Also in its first step, where much is allowed, before the others give up."""
    assert_thread_is_found(together["thread"], reference)


@pytest.mark.slow
def test_a_rank_that_runs_as_a_thread_is_found_in_a_later_step(start, reference):
    assert_thread_is_found(stand_still(start, "hold-2-5-forward", *THREADS), reference)


def assert_thread_is_found(run, reference):
    code, _, err = run.end()
    rank, _, report = named(err.splitlines()[-1], LAST)
    assert code == 1
    assert rank == 2
    assert "hold_for_ever" in stack_of(report, 2)
    assert "in train" in stack_of(report, 0)
    finish(run.folder, *FOUR, backend="simulated")
    assert_stood(run.folder, reference("simulated"), MOST_LOST)


def test_without_a_watchdog_who_is_waited_for_is_named_and_not_who_gave_up(together, reference):
    run = together["unwatched"]
    code, _, err = run.end()
    last = err.splitlines()[-1]
    assert code == 1, err
    noticed = r"; noticed by rank [013]: CommunicationError: "
    assert re.match(LAST + r"rank 2, step 5, forward: rank 2 at forward of step 5, \d+ s without a change .*" + noticed, last), last
    finish(run.folder, *FOUR)
    assert_stood(run.folder, reference("gloo"), MOST_LOST)


def test_what_may_take_long_is_no_hang(together, reference):
    """A first step and a validation."""
    run = together["long"]
    code, _, err = run.end()
    assert code == 0, err
    assert_stood(run.folder, reference("gloo"), 0)
