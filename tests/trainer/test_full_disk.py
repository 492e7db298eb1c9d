"""A disk that is full for a while costs a run its saves and some steps, whatever else writes there; then it goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounts import can_mount

HERE = Path(__file__).parent


@pytest.mark.skipif(not can_mount(), reason="needs `unshare -rm` with mounts (root, or user namespaces)")
@pytest.mark.parametrize("backend", ["simulated", pytest.param("gloo", marks=pytest.mark.slow)])
def test_a_run_outlives_a_full_disk_even_when_it_is_started_again_there(tmp_path: Path, backend: str) -> None:
    command = ["unshare", "-rm", sys.executable, str(HERE / "full_disk.py"), str(tmp_path), backend]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["code"] == 0, done.stderr
    assert found["starts"] == [4, 4]
    for said in (
        "ledger.jsonl cannot be written (No space left on device); its lines wait",
        "metrics.jsonl cannot be written (No space left on device); its lines wait",
        "step 6 was not saved: rank ",
        "RuntimeError: while the disk was full; restart 1 of 3",
        "restart 3 of 3 in 0 s, from step-00000004",
    ):
        assert said in done.stderr, done.stderr
    assert found["steps"] == list(range(1, 31))
    assert found["failures"] == [26, 0, 0]
    assert found["checkpoints"] == ["step-00000028", "step-00000030"]
    assert found["problems"] == [[], []]
    # Another run, that finds the disk full when it begins.
    assert found["refused"] == 1
    assert done.stderr.splitlines()[-1].startswith("bagualu: failed: No space left on device")
