"""One job for one run directory, without anything that a kill leaves behind."""

import os
import re
import signal
import subprocess
import sys

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance import run_lock

HOLD = """
import sys, time
from pathlib import Path
from bagualu.fault_tolerance.run_lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_job_is_refused_with_who_holds_it_and_a_kill_gives_it_back(tmp_path):
    run_dir = tmp_path / "run"
    run_lock.refuse_if_held(run_dir)
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    before = (run_dir / ".lock").read_bytes()
    for refused in (lambda: run_lock.refuse_if_held(run_dir), lambda: run_lock.hold(run_dir).__enter__()):
        with pytest.raises(RecipeError) as error:
            refused()
        said = rf"run.dir={run_dir} is in use by process {first.pid} on {os.uname().nodename} since \d{{4}}-\d\d-\d\d .*; wait"
        assert re.match(said, str(error.value))
        assert "\n" not in str(error.value)
    assert (run_dir / ".lock").read_bytes() == before
    first.send_signal(signal.SIGKILL)
    first.wait()
    run_lock.refuse_if_held(run_dir)
    with run_lock.hold(run_dir), pytest.raises(RecipeError, match=f"process {os.getpid()}"), run_lock.hold(run_dir):
        pass


def test_a_job_on_several_nodes_is_told_apart_by_its_name(tmp_path):
    with run_lock.hold(tmp_path, "7"):
        run_lock.refuse_if_held(tmp_path, "7")  # a node that joins, or comes back
        for refused in (lambda: run_lock.refuse_if_held(tmp_path, "8"), lambda: run_lock.refuse_if_held(tmp_path)):
            with pytest.raises(RecipeError, match=f"in use by job 7, process {os.getpid()} on "):
                refused()
        with pytest.raises(RecipeError, match="in use by job 7"), run_lock.hold(tmp_path, "8"):
            pass
        with run_lock.hold(tmp_path, "7"):  # put back into the queue; its crashed node's lock is still there
            pass
    with run_lock.hold(tmp_path), pytest.raises(RecipeError, match="in use by process"):
        run_lock.refuse_if_held(tmp_path, "7")
    run_lock.refuse_if_held(tmp_path, "8")


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"cannot be written \(Not a directory\)"), run_lock.hold(tmp_path / "file" / "run"):
        pass


def test_where_there_are_no_locks_the_fence_has_to_do(tmp_path, monkeypatch):
    def none(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", none)
    with run_lock.hold(tmp_path), run_lock.hold(tmp_path):
        pass
