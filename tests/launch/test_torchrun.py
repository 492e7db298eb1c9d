"""Workers of torchrun, which forgets them when it is killed, and gives those that it starts again the store of the dead."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.launch.conftest import PATHS
from tests.launch.survival import SMALL, finish, small
from tests.launch.warm import Forked
from tests.listening import listening, outside_interface
from tests.standing import assert_stood

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(300)]
WORDS = ["parallel.data=2", "train.steps=6", "checkpoint.every=2"]
WORKER = """
import sys
from bagualu.trainer.__main__ import main
sys.exit(main(sys.argv[1:], entrypoint="faulty:train"))
"""
TORCHRUN = "import sys; from tests.launch.warm_torchrun import main; main(sys.argv[1:])"


def test_no_worker_outlives_a_killed_torchrun_by_2_seconds(tmp_path, gone, leftovers, undisturbed):
    """Not even a rank that is stopped. The other one waits for it, so the run is still under way."""
    script, folder = tmp_path / "worker.py", tmp_path / "run"
    script.write_text(WORKER)
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *SMALL, *WORDS,
         "run.name=freeze-1-5-forward", f"run.dir={folder}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**leftovers.environment, "PYTHONPATH": PATHS, "GLOO_SOCKET_IFNAME": outside_interface() or "lo"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (folder / "freeze-5-forward").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        workers = [json.loads((folder / f"rank-{rank}.json").read_text())["pid"] for rank in (0, 1)]
        assert set(listening(*workers).values()) == {"127.0.0.1"}
        process.kill()
        assert gone(workers, within=2)
    finally:
        process.kill()
        process.wait()
        for pid in leftovers.pids():
            os.kill(pid, signal.SIGKILL)
    finish(folder, *WORDS)
    assert_stood(folder, undisturbed(small(folder, *WORDS), "gloo"), 4)


DIES_WHILE_IT_CONNECTS = """
import os, pathlib, signal, sys
from bagualu.comm import torch_transport

def join(store, world, *arguments):
    keys, mark = kept(store, world, *arguments), pathlib.Path(sys.argv[-1].split("=")[1]) / "died-while-connecting"
    if world.rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return keys

kept, torch_transport.join = torch_transport.join, join
"""


def test_after_a_death_while_connecting_and_another_in_a_step_the_run_goes_on_by_itself(tmp_path, leftovers, undisturbed):
    """All attempts have the store of torchrun, at one port."""
    script, folder = tmp_path / "worker.py", tmp_path / "run"
    folder.mkdir()
    script.write_text(DIES_WHILE_IT_CONNECTS + WORKER)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    options = ["--rdzv-backend=static", f"--master-port={port}", "--nproc-per-node=2", "--max-restarts=2", str(script)]
    words = [*SMALL, *WORDS, "checkpoint.resume=true", "run.name=kill-1-5-forward", f"run.dir={folder}"]
    with Forked(TORCHRUN, [*options, *words], cwd=tmp_path, env={**leftovers.environment, "PYTHONPATH": PATHS}) as done:
        try:
            _, err = done.communicate(timeout=200)
        finally:
            done.kill()
    assert (folder / "died-while-connecting").exists(), err
    assert (folder / "kill-5-forward").exists()
    assert done.returncode == 0, err
    assert " (native, ZeRO-1) as 2 processes with comm.backend=" in err
    assert_stood(folder, undisturbed(small(folder, *WORDS), "gloo"), 4)
