"""The trainer itself, killed and started again: nothing is lost, nothing is done twice."""

import re
import sys

import pytest

from bagualu.fault_tolerance.ledger.events import read
from tests.launch.survival import FOUR, MOST_LOST, SMALL, finish, small
from tests.standing import assert_stood, figures

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
pytestmark = [LINUX, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def reference(undisturbed, tmp_path_factory):
    return undisturbed(small(tmp_path_factory.mktemp("unused"), *FOUR), "gloo")


def test_a_rank_killed_in_each_part_of_a_step_leaves_the_run_as_it_would_have_been(start, reference):
    kills = [(1, 3, "forward"), (0, 4, "backward"), (3, 6, "reduce"), (2, 8, "optimizer")]
    name = ".".join(f"kill-{rank}-{step}-{point}" for rank, step, point in kills)
    run = start(*SMALL, *FOUR, f"run.name={name}", "restart.limit=4", "restart.backoff_seconds=0", entrypoint="faulty:train")
    code, _, err = run.end()
    assert code == 0, err
    restarts = re.findall(r"bagualu: rank (\d) failed, step (\d).*SIGKILL.*; restart (\d) of 4 .*, from (.*)", err)
    assert [(int(rank), int(step), int(count)) for rank, step, count, _ in restarts] == [
        (rank, step, count) for count, (rank, step, _) in enumerate(kills, 1)
    ]
    seen = [event.wall for event in read(run.folder) if event.what == "failed"]  # when all its peers were dead
    struck = [(run.folder / f"kill-{step}-{point}").stat().st_mtime for _, step, point in kills]
    assert all(dead - killed < 2 for dead, killed in zip(seen, struck, strict=True))
    assert_stood(run.folder, reference, MOST_LOST)


def test_a_death_that_the_launcher_has_just_not_seen_is_a_failure_like_any_other(start, reference):
    """Once with a restart before it, whose failure is not the one that is told."""
    name, late = "kill-1-3-forward.kill-0-6-backward", "tests.launch.late_look"
    words = [f"run.name={name}", "restart.limit=2", "restart.backoff_seconds=0"]
    run = start(*SMALL, *FOUR, *words, entrypoint="faulty:train", module=late)
    code, _, err = run.end()
    assert code == 0, err
    restarts = re.findall(r"bagualu: rank (\d) failed, step (\d).*SIGKILL.*; restart (\d) of 2", err)
    assert restarts == [("1", "3", "1"), ("0", "6", "2")], err
    assert_stood(run.folder, reference, MOST_LOST)


def test_a_signal_to_one_rank_stops_all_at_one_step_and_a_second_one_breaks_no_save(start, reference):
    """To rank 2 in the middle of step 4, and to rank 1 once more while it saves."""
    run = start(*SMALL, *FOUR, "run.name=usr1-2-4-backward.stop-1-4-write", entrypoint="faulty:train")
    code, _, err = run.end()
    assert code == 75, err
    assert [line["step"] for line in figures(run.folder)] == [1, 2, 3, 4]
    assert "saved step 4" in err
    assert "not saved yet" in (run.folder / "logs" / "rank-2.log").read_text()
    finish(run.folder, *FOUR)
    assert_stood(run.folder, reference, 0)
