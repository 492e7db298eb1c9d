"""A process that cannot run Python any more still tells where it is, and is gone afterwards."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bagualu.fault_tolerance.watchdog.stacks import end_all

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs processes with signals and /proc")
_WORKER = """
import ctypes, hashlib, os, signal, sys, threading, time
from pathlib import Path
from bagualu.fault_tolerance.watchdog.stacks import show_on_signal
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
show_on_signal(folder, rank)
def lock_twice(libc):
    lock = ctypes.create_string_buffer(64)
    (folder / f"ready-{rank}").touch()
    libc.pthread_mutex_lock(lock), libc.pthread_mutex_lock(lock)
def keeps_the_lock():
    lock_twice(ctypes.PyDLL(None))
def waits_in_native_code():
    lock_twice(ctypes.CDLL(None))
def works():
    (folder / f"ready-{rank}").touch()
    while True: time.sleep(0.01)
def stands_among_threads():
    for _ in range(32):
        threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"", b"", 10**9), daemon=True).start()
    stops()
    while True: pass
def stops():
    (folder / f"ready-{rank}").touch()
    os.kill(os.getpid(), signal.SIGSTOP)
def in_a_thread():
    threading.Thread(target=keeps_the_lock).start()
    time.sleep(1000)
globals()[sys.argv[3]]()
"""


@pytest.mark.timeout(120)
def test_every_way_to_stand_still_leaves_a_stack_and_no_process(tmp_path: Path) -> None:
    ways = ["keeps_the_lock", "waits_in_native_code", "works", "in_a_thread", "works"]
    workers = [subprocess.Popen([sys.executable, "-c", _WORKER, str(tmp_path), str(rank), way]) for rank, way in enumerate(ways)]
    try:
        while not all((tmp_path / f"ready-{rank}").exists() for rank in range(len(ways))):
            assert all(worker.poll() is None for worker in workers)
            time.sleep(0.02)
        time.sleep(0.3)  # until the locks are held
        os.kill(workers[4].pid, signal.SIGSTOP)
        while psutil.Process(workers[4].pid).status() != "stopped":
            time.sleep(0.02)
        stacks = end_all(tmp_path, {rank: worker.pid for rank, worker in enumerate(workers)})
        for rank, way in enumerate(ways):
            assert "keeps_the_lock" in stacks[rank] if way == "in_a_thread" else way in stacks[rank]
            assert workers[rank].wait(10) == -signal.SIGKILL
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


@pytest.mark.timeout(120)
def test_a_stopped_process_tells_where_it_stood_and_not_where_it_went_when_continued(tmp_path: Path) -> None:
    """Whichever of its threads the kernel wakes first."""
    for rank in range(5):
        worker = subprocess.Popen([sys.executable, "-c", _WORKER, str(tmp_path), str(rank), "stands_among_threads"])
        try:
            while psutil.Process(worker.pid).status() != "stopped":
                assert worker.poll() is None
                time.sleep(0.02)
            assert "in stops\n" in end_all(tmp_path, {rank: worker.pid})[rank]
            assert worker.wait(10) == -signal.SIGKILL
        finally:
            worker.kill()
            worker.wait()


def test_a_process_that_never_learnt_to_tell_is_ended_all_the_same(tmp_path: Path) -> None:
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        assert end_all(tmp_path, {0: worker.pid, 1: 2**22 - 1}) == {}  # the other one is gone already
        assert worker.wait(10) == -signal.SIGKILL
    finally:
        worker.kill()
        worker.wait()


def test_a_stack_whose_writer_has_to_wait_is_read_whole(tmp_path: Path) -> None:
    program = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def tell(*_):
    with (folder / "rank-00000.stack").open("a") as file:
        for part in ("first ", "second"):
            print(part, file=file, end="", flush=True)
            time.sleep(0.15)
signal.signal(signal.SIGUSR2, tell)
(folder / "rank-00000.stack").touch()
while True: time.sleep(1)
"""
    worker = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    try:
        while not (tmp_path / "rank-00000.stack").exists():
            time.sleep(0.02)
        assert end_all(tmp_path, {0: worker.pid}) == {0: "first second"}
    finally:
        worker.kill()
        worker.wait()
