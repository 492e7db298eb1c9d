"""Machines that die: the one with the store, or another; while all train, meet, connect. The others end or go on, and soon.

Soon is long before a communication gives up (comm.timeout_seconds) or a hang is noticed (restart.hang_seconds): minutes, here.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Undisturbed
from tests.launch.survival import MOST_LOST, small
from tests.leftovers import Leftovers
from tests.standing import assert_names_rank_phase_and_cause, assert_stood
from tests.wire import why_not

NONE = why_not()
pytestmark = [
    pytest.mark.skipif(bool(NONE), reason=f"needs network namespaces, as root or unprivileged: {NONE}"),
    pytest.mark.timeout(400),
]
ROOT = Path(__file__).parents[2]
WORDS = ["parallel.data=3", "data.global_batch=6", "train.steps=12", "checkpoint.every=2", "restart.backoff_seconds=0.1"]
SHORT, LONG = "restart.wait_seconds=10", "restart.wait_seconds=60"
STORE = "the node that holds the rendezvous store, 10.77.0.1 at port 29500, cannot be reached"
NOBODY = "waited restart.wait_seconds=10 s for 3 nodes, but not all of them joined; lost since the last start: 10.77.0.3"
SLOW = pytest.mark.slow


@pytest.fixture
def reference(undisturbed: Undisturbed, tmp_path: Path) -> Path:
    return undisturbed(small(tmp_path / "unused", *WORDS), "gloo")


def die(case: str, folder: Path, leftovers: Leftovers, patience: str) -> tuple[dict[str, Any], list[list[str]]]:
    """What became of the machines, and what the agents of each said."""
    command = ["unshare", "-rn", sys.executable, "-m", "tests.launch.hosts", str(folder), case, *WORDS, patience]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=leftovers.environment)
    said = [path.read_text().splitlines() if (path := folder / f"agent-{machine}").exists() else [] for machine in range(3)]
    assert done.returncode == 0, (done.stderr, said)
    return json.loads(done.stdout.splitlines()[-1]), said


@pytest.mark.parametrize(
    ("case", "cause"),
    [
        pytest.param("0-connecting-all", STORE, marks=SLOW),  # test_node.py has it within one machine
        pytest.param("2-connecting-all", NOBODY, marks=SLOW),
        pytest.param("0-connecting-agent", STORE, marks=SLOW),
        pytest.param("0-training-all", STORE, marks=SLOW),
        pytest.param("0-training-agent", STORE, marks=SLOW),
        pytest.param("0-training-power", STORE, marks=SLOW),
        pytest.param("0-joining-all", STORE, marks=SLOW),
        pytest.param("0-meeting-all", STORE, marks=SLOW),
        pytest.param("2-connecting-power", NOBODY, marks=SLOW),
        pytest.param("2-training-all", NOBODY, marks=SLOW),
        pytest.param("2-training-power", NOBODY, marks=SLOW),
        pytest.param("2-meeting-all", NOBODY, marks=SLOW),
    ],
)  # fmt: skip
def test_the_others_end_soon_with_the_cause_and_one_of_them_resumes_to_the_same_bits(
    tmp_path: Path, leftovers: Leftovers, reference: Path, case: str, cause: str
) -> None:
    told, said = die(case, tmp_path, leftovers, SHORT)
    assert set(told["codes"]) == {1}
    for machine in {0, 1, 2} - {int(case[0])}:
        last = next((line for line in reversed(said[machine]) if line.startswith("bagualu: failed: ")), None)
        if last is None:
            assert case == "0-joining-all", "the third was never started"
            continue
        assert_names_rank_phase_and_cause(last)
        assert re.search(rf"(start|step \d+|meeting the other nodes): {re.escape(cause)}; ", last), said
    assert told["resumed"][min(1, len(told["resumed"]) - 1)] == 0, said
    assert_stood(tmp_path / "run", reference, MOST_LOST)


@pytest.mark.parametrize(
    "case",
    [
        "2-connecting-worker",
        pytest.param("2-connecting-late", marks=SLOW),
        pytest.param("2-connecting-back", marks=SLOW),
        pytest.param("2-training-back", marks=SLOW),
        pytest.param("2-training-worker", marks=SLOW),
        pytest.param("2-meeting-back", marks=SLOW),
    ],
)
def test_where_it_comes_back_in_time_the_run_goes_on_by_itself_to_the_same_bits(
    tmp_path: Path, leftovers: Leftovers, reference: Path, case: str
) -> None:
    told, said = die(case, tmp_path, leftovers, LONG)
    assert told["resumed"] == [0, 0, 0], said
    if case == "2-connecting-late":
        assert "restart" not in " ".join(line for lines in said for line in lines if line.startswith("bagualu: ")), said
    assert_stood(tmp_path / "run", reference, MOST_LOST)
