"""Two jobs in one run directory: the second is refused at once; what was killed is no obstacle."""

import os
import signal
import sys

import pytest

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(300)]


def test_a_second_job_in_the_same_directory_is_refused_until_the_first_is_gone(start, gone):
    first = start()
    pids = [rank["pid"] for rank in first.started()]
    second = start("checkpoint.resume=true")
    code, out, err = second.end()
    assert (code, out) == (2, "")
    assert f"is in use by process {first.process.pid} on {os.uname().nodename} since " in err
    assert len(err.splitlines()) == 1
    assert gone([second.process.pid])
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    assert gone(pids)
    third = start("checkpoint.resume=true", "train.steps=3")
    assert third.end()[0] == 0
