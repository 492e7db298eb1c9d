"""Ranks and nodes lost under `bagualu train` and under node agents, with nothing on storage to go on from."""

import re
import sys

import pytest

from tests.launch.survival import SMALL, small
from tests.launch.test_node import WORDS as NODES
from tests.launch.test_node import nodes  # noqa: F401  (a fixture)
from tests.standing import assert_stood

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
pytestmark = [LINUX, pytest.mark.timeout(300)]
WORDS = [*NODES, "checkpoint.every=0"]


@pytest.fixture(scope="module")
def reference(undisturbed, tmp_path_factory):
    return undisturbed(small(tmp_path_factory.mktemp("unused"), *WORDS), "gloo")


def test_killed_ranks_cost_at_most_the_steps_since_the_last_replica(start, reference):
    name = "kill-3-6-forward.kill-0-10-publish.kill-1-12-backward"
    run = start(*SMALL, *WORDS, f"run.name={name}", "checkpoint.replica_every=2", "restart.limit=3", "restart.backoff_seconds=0",
                entrypoint="faulty:train")  # fmt: skip
    code, _, err = run.end()
    assert code == 0, err
    assert re.findall(r"going on from the replica of step (\d+) in memory", err) == ["4", "8", "10"], err
    assert_stood(run.folder, reference, 2)
    assert [path.name for path in (run.folder / "checkpoints").glob("step-*")] == ["step-00000030"]


def test_a_node_that_is_lost_and_replaced_gets_its_state_from_the_other(nodes, reference):  # noqa: F811
    run = nodes(*WORDS, "run.name=slow", "checkpoint.replica_every=1", "restart.backoff_seconds=0")
    (run.folder / "slow").touch()
    stays = run.start()
    run.until(run.listens)
    goes = run.start()
    run.until(lambda: run.steps() >= 5)
    goes.kill()
    back = run.start()
    run.until(lambda: "going on from the replica of step" in run.said())
    (run.folder / "slow").unlink()
    assert stays.wait(120) == 0, run.said()
    assert back.wait(60) == 0, run.said()
    assert_stood(run.folder, reference, 2)
