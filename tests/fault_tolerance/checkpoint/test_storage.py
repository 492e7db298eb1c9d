"""Real mounts and real stopped processes: tests 15, 18, 23, 24 and 26 of the reference, as programs of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounts import can_mount

HERE = Path(__file__).parent


@pytest.mark.skipif(not can_mount(), reason="needs `unshare -rm` with mounts (root, or user namespaces)")
def test_a_full_a_read_only_and_a_removed_disk(tmp_path):
    command = ["unshare", "-rm", sys.executable, str(HERE / "small_disk.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["first"], found["freed"], found["back"]) == ("saved", "saved", "saved")
    assert "step 20 was not saved: rank " in found["full"]
    assert "No space left on device" in found["full"]
    assert found["left when full"] == [".epoch", "step-00000010"]
    assert found["old intact"]
    assert "Read-only file system" in found["read-only"]
    assert len(set(found["read-only start"])) == 1
    assert "cannot be written: OSError: [Errno 30] Read-only file system" in found["read-only start"][0]
    assert "see whether its storage is still mounted" in found["taken away"]
    assert not [name for name in found["left below the mount"] if name.startswith("step-")]
    assert found["newest"] == "step-00000050"
    assert found["problems"] == []


def test_a_stopped_process_cannot_commit_after_the_run_has_started_anew(tmp_path):
    """Every third call; checks.zombie goes through all of them with threads."""
    command = [sys.executable, str(HERE / "stopped_save.py"), str(tmp_path), "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) >= 5
    for row in rows:
        assert row["saved"]
        assert row["problems"] == []
        assert row["found"] == [*row["there"], "step-00000030"]
        assert row["zombie"] == (10 if "step-00000020" in row["there"] else 11)
    assert {row["zombie"] for row in rows} >= {11}
    assert "belongs to a later start of this run" in done.stderr
