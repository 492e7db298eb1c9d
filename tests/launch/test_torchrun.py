"""Workers of torchrun, which forgets them when it is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(300)]
WORKER = """
import sys
from bagualu.trainer.__main__ import main
sys.exit(main(sys.argv[1:], entrypoint="stand_in:train"))
"""


def test_no_worker_outlives_a_killed_torchrun_by_2_seconds(tmp_path, gone):
    """Not even a rank that is stopped."""
    script, folder = tmp_path / "worker.py", tmp_path / "run"
    script.write_text(WORKER)
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, "recipe=tiny",
         "parallel.expert=1", "parallel.data=1", "train.steps=100000", f"run.dir={folder}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        workers = [json.loads((folder / f"rank-{rank}.json").read_text())["pid"] for rank in (0, 1)]
        os.kill(workers[1], signal.SIGSTOP)
        process.kill()
        assert gone(workers, within=2)
    finally:
        process.kill()
        process.wait()
        for worker in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(script) in worker.cmdline():
                    worker.kill()
