"""Workers of torchrun, which forgets them when it is killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.conftest import PATHS
from tests.launch.survival import SMALL, finish, small
from tests.standing import assert_stood

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(300)]
WORDS = ["parallel.data=2", "train.steps=6", "checkpoint.every=2"]
WORKER = """
import sys
from bagualu.trainer.__main__ import main
sys.exit(main(sys.argv[1:], entrypoint="faulty:train"))
"""


def test_no_worker_outlives_a_killed_torchrun_by_2_seconds(tmp_path, gone, leftovers, undisturbed):
    """Not even a rank that is stopped. The other one waits for it, so the run is still under way."""
    script, folder = tmp_path / "worker.py", tmp_path / "run"
    script.write_text(WORKER)
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *SMALL, *WORDS,
         "run.name=freeze-1-5-forward", f"run.dir={folder}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**leftovers.environment, "PYTHONPATH": PATHS},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (folder / "freeze-5-forward").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        workers = [json.loads((folder / f"rank-{rank}.json").read_text())["pid"] for rank in (0, 1)]
        process.kill()
        assert gone(workers, within=2)
    finally:
        process.kill()
        process.wait()
        for pid in leftovers.pids():
            os.kill(pid, signal.SIGKILL)
    finish(folder, *WORDS)
    assert_stood(folder, undisturbed(small(folder, *WORDS), "gloo"), 4)
