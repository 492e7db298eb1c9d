"""Two jobs in one run directory: the second is refused at once; what was killed is no obstacle."""

import json
import os
import signal
import sys

import pytest

from bagualu.fault_tolerance import run_lock
from bagualu.trainer.__main__ import main
from tests.launch.survival import SMALL, finish, small
from tests.launch.test_torchrun import WORDS
from tests.standing import assert_stood

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(300)]


def test_a_second_job_in_the_same_directory_is_refused_until_the_first_is_gone(start, gone, undisturbed):
    """Neither writes where the other does, and what was killed is gone on with."""
    words = [*SMALL, *WORDS]
    first = start(*words, "run.name=hold-1-5-forward", entrypoint="faulty:train")
    first.until((first.folder / "holding").exists)
    pids = [json.loads((first.folder / f"rank-{rank}.json").read_text())["pid"] for rank in (0, 1)]
    second = start(*words, "checkpoint.resume=true", entrypoint="faulty:train")
    code, out, err = second.end()
    assert (code, out) == (2, "")
    assert f"is in use by process {first.process.pid} on {os.uname().nodename} since " in err
    assert len(err.splitlines()) == 1
    assert gone([second.process.pid])
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    assert gone(pids)
    run_lock.refuse_if_held(first.folder)
    finish(first.folder, *WORDS)
    assert_stood(first.folder, undisturbed(small(first.folder, *WORDS), "gloo"), 4)


def test_rank_0_of_torchrun_is_refused_too(tmp_path, capsys):
    words = ["recipe=tiny", "parallel.data=1", "parallel.pipeline=1", "parallel.expert=1", f"run.dir={tmp_path}"]
    with run_lock.hold(tmp_path):
        assert main(words) == 2
    assert f"run.dir={tmp_path} is in use by process {os.getpid()} on " in capsys.readouterr().err
