"""The launch's folder is gone however the launcher ends."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from bagualu.launch.workers.scratch import scratch

LAUNCHER = """
import sys, time
from pathlib import Path
from bagualu.launch.workers.scratch import scratch
with scratch(Path(sys.argv[1])) as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text("x" * 100_000)
    print(folder, flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def launcher(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    folder = tmp_path / process.stdout.readline().strip()
    assert (folder / "deep" / "file").exists()
    yield process, folder
    process.kill()
    process.wait()


def remover_of(process):
    """The pid of the one child of the launcher."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
        return int(children.read())


def empty(root):
    deadline = time.monotonic() + 20
    while any(root.iterdir()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_the_folder_lives_as_long_as_the_block_and_is_this_users_alone(tmp_path):
    with scratch(tmp_path) as folder:
        (folder / "file").write_text("x")
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == []


def test_the_folder_lies_in_memory_where_there_is_some():
    with scratch() as folder:
        if os.access("/dev/shm", os.W_OK):
            assert folder.parent.as_posix() == "/dev/shm"
    assert not folder.exists()


def test_an_error_removes_it_too(tmp_path):
    with pytest.raises(ValueError, match="mine"), scratch(tmp_path):
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


def test_it_is_gone_after_the_block_when_its_remover_was_killed(tmp_path):
    with scratch(tmp_path) as folder:
        (folder / "file").write_text("x")
        children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
        remover = next(child for child in children if str(folder) in child.cmdline())
        os.killpg(remover.pid, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_killed_while_it_makes_the_folder_leaves_none(tmp_path):
    killed = "import fcntl, os\nfcntl.flock = lambda *_: os.kill(os.getpid(), 9)\n" + LAUNCHER
    process = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert empty(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_it_is_gone_when_the_launcher_is_killed(tmp_path, launcher, number):
    process, _ = launcher
    process.send_signal(number)
    process.wait()
    assert empty(tmp_path)


def test_signals_that_end_a_job_do_not_end_the_remover(tmp_path, launcher):
    process, folder = launcher
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(remover_of(process), number)
    time.sleep(0.3)
    assert folder.exists()
    process.kill()
    process.wait()
    assert empty(tmp_path)


def test_the_next_launch_removes_what_a_killed_job_left_and_nothing_that_is_in_use(tmp_path, launcher):
    process, folder = launcher
    with scratch(tmp_path):
        assert folder.exists()
    remover = remover_of(process)
    os.killpg(remover, signal.SIGKILL)
    process.kill()
    process.wait()
    assert folder.exists()
    with scratch(tmp_path) as other:
        assert [path for path in tmp_path.iterdir() if path.name.startswith("bagualu-")] == [other]
