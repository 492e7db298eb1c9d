"""The link between two nodes is lost, both of which see the storage: one side goes on, and it alone commits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from tests.conftest import Undisturbed
from tests.launch.survival import small
from tests.leftovers import Leftovers
from tests.standing import assert_names_rank_phase_and_cause, assert_stood
from tests.wire import why_not

NONE = why_not()
pytestmark = [
    pytest.mark.skipif(bool(NONE), reason=f"needs network namespaces, as root or unprivileged: {NONE}"),
    pytest.mark.timeout(300),
]
ROOT = Path(__file__).parents[2]
LAYOUT = ["parallel.data=4", "train.steps=18", "checkpoint.every=3", "checkpoint.keep=10"]
PATIENCE = ["restart.elastic=true", "restart.wait_seconds=2", "restart.backoff_seconds=0.1", "restart.hang_seconds=0",
            "comm.timeout_seconds=6"]  # fmt: skip


@pytest.mark.parametrize(
    "how", [pytest.param("both", marks=pytest.mark.slow), pytest.param("from_1", marks=pytest.mark.slow), "from_0"]
)
def test_one_side_at_most_commits(tmp_path: Path, undisturbed: Undisturbed, leftovers: Leftovers, how: str) -> None:
    reference = undisturbed(small(tmp_path / "unused", *LAYOUT), "simulated")
    command = ["unshare", "-rn", sys.executable, "-m", "tests.launch.cut_off", str(tmp_path), how, *LAYOUT, *PATIENCE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=leftovers.environment)
    said = [(tmp_path / f"agent-{machine}").read_text() for machine in (0, 1)]
    assert done.returncode == 0, (done.stderr, said)
    told = json.loads(done.stdout.splitlines()[-1])

    committed = [(line["step"], line["machine"]) for line in told["commits"] if not line["error"]]
    (refused,) = [(line["step"], line["machine"]) for line in told["commits"] if line["error"]]
    assert refused[1] == 0, "the side that is left behind tries, when it is let go"
    assert (refused[0], 1) in committed, "the side that goes on commits that step itself"
    steps = [step for step, _ in committed]
    assert steps == sorted(set(steps)), "no step by both"
    assert steps[-1] == 18
    later = [machine for step, machine in committed if step > refused[0]]
    if not (tmp_path / "run" / "started-4").exists():  # on a busy machine the run may take machine 0 back before its end
        assert later == [1] * steps[::-1].index(refused[0])
    assert later == sorted(later, reverse=True), "machine 0 commits only once the run has taken it back"
    assert told["codes"][1] == 0, said
    if told["codes"][0]:  # else the link was there again in time for it to hear how the run had ended
        assert_names_rank_phase_and_cause(said[0].splitlines()[-1])  # a rank that lost its peers, or the store that is gone

    run = tmp_path / "run"
    assert [problem for path in list_checkpoints(run / "checkpoints") for problem in verify(path)] == []
    assert_stood(run, reference, 6, exact=False)
