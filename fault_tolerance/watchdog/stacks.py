"""Gets the stacks of workers that make no progress, from another process.

A C signal handler writes a worker's stack; it needs neither Python's lock nor a thread that listens. A stopped process runs no
handler. So it is continued once all other processes are dead, writes its stack, and is killed. The signal goes to its main thread,
which trains: any other thread could run the handler after the main one has already left the place where it stood.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from bagualu.fault_tolerance.watchdog.verdict import GONE, STOPPED

SIGNAL = signal.SIGUSR2
_PATIENCE_SECONDS = 2.0
"""Seconds that processes get to write their stacks, and that killed processes get to disappear."""
_QUIET_SECONDS = 0.3
"""A stack that has not grown for this many seconds is taken to be complete; on a busy machine the writer may pause in the
middle."""


def show_on_signal(folder: Path, rank: int) -> None:
    """Makes this process, that of `rank`, append the stacks of all its threads to a file in `folder` whenever it receives
    SIGNAL."""
    folder.mkdir(parents=True, exist_ok=True)
    faulthandler.register(SIGNAL, file=_file(folder, rank).open("w"), all_threads=True, chain=False)  # it keeps the file open


def of_threads(threads: Mapping[int, int]) -> dict[int, str]:
    """Returns, by rank, the stacks of ranks that are threads of this process; `threads` maps ranks to thread identifiers."""
    frames = sys._current_frames()
    return {rank: "".join(traceback.format_stack(frames[thread])) for rank, thread in threads.items() if thread in frames}


def end_all(folder: Path, processes: Mapping[int, int]) -> dict[int, str]:
    """Kills `processes` (the process id of each rank) and returns, by rank, the stacks of those that could write them."""
    stopped = {rank for rank, pid in processes.items() if _state(pid) in STOPPED}
    running = {rank: pid for rank, pid in processes.items() if rank not in stopped}
    stacks = _ask(folder, running)
    for pid in running.values():
        _send(pid, signal.SIGKILL)
    _wait_until_dead(running.values())
    stacks |= _ask(folder, {rank: processes[rank] for rank in stopped}, continue_first=True)
    for rank in stopped:
        _send(processes[rank], signal.SIGKILL)
    return stacks


def _ask(folder: Path, processes: Mapping[int, int], continue_first: bool = False) -> dict[int, str]:
    """Asks the processes by SIGNAL for their stacks and returns, by rank, those written in time. With `continue_first`, also
    continues the processes, which are stopped."""
    asked = {rank: pid for rank, pid in processes.items() if _file(folder, rank).exists()}  # SIGNAL would kill the others
    begin = {rank: _file(folder, rank).stat().st_size for rank in asked}  # earlier stacks come before this
    for pid in asked.values():
        _send_to_main_thread(pid, SIGNAL)
        if continue_first:
            _send(pid, signal.SIGCONT)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    stacks: dict[int, str] = {}
    size, grown = dict(begin), dict.fromkeys(asked, time.monotonic())
    while len(stacks) < len(asked):
        time.sleep(0.02)
        now = time.monotonic()
        for rank in asked.keys() - stacks.keys():
            text = _file(folder, rank).read_bytes()
            if len(text) > size[rank]:
                size[rank], grown[rank] = len(text), now
            if len(text) > begin[rank] and (now - grown[rank] > _QUIET_SECONDS or now > deadline):
                stacks[rank] = text[begin[rank] :].decode(errors="replace")
        if now > deadline:
            break
    return stacks


def _wait_until_dead(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while any(_state(pid) not in GONE for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)


def _state(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _send_to_main_thread(pid: int, number: signal.Signals) -> None:
    to_thread = getattr(ctypes.CDLL(None), "tgkill", None)  # in glibc since 2.30; the main thread's id is the process's
    if to_thread is None:
        _send(pid, number)
    else:
        to_thread(pid, pid, number)  # a process that is gone is no error here either


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.stack"
