"""Stacks of workers that stand still, from the outside. Free of torch.

A worker's stack is written by a C signal handler, which needs neither Python's lock nor a thread that listens. A stopped process
runs no handler: it gets its stack in the moment between being let go and being killed, when all its peers are dead.
"""

import contextlib
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
"""For a stack to be written."""
_QUIET_SECONDS = 0.3
"""A stack that has not grown for so long is whole: on a busy machine who writes it is made to wait in the middle."""


def show_on_signal(folder: Path, rank: int) -> None:
    """From now on this process writes the stacks of its threads into `folder` when it gets SIGNAL."""
    folder.mkdir(parents=True, exist_ok=True)
    faulthandler.register(SIGNAL, file=_file(folder, rank).open("w"), all_threads=True, chain=False)  # which keeps it open


def of_threads(threads: Mapping[int, int]) -> dict[int, str]:
    """The stacks of ranks that are threads of this process, by rank; `threads`: their identifiers."""
    frames = sys._current_frames()
    return {rank: "".join(traceback.format_stack(frames[thread])) for rank, thread in threads.items() if thread in frames}


def end_all(folder: Path, processes: Mapping[int, int]) -> dict[int, str]:
    """Kill the processes, by rank; the stacks they had, of those that could tell."""
    stopped = {rank for rank, pid in processes.items() if _state(pid) in STOPPED}
    running = {rank: pid for rank, pid in processes.items() if rank not in stopped}
    stacks = _ask(folder, running)
    for pid in running.values():
        _send(pid, signal.SIGKILL)
    _wait_until_dead(running.values())
    stacks |= _ask(folder, {rank: processes[rank] for rank in stopped}, let_go=True)
    for rank in stopped:
        _send(processes[rank], signal.SIGKILL)
    return stacks


def _ask(folder: Path, processes: Mapping[int, int], let_go: bool = False) -> dict[int, str]:
    """The stacks that the processes write when they are asked."""
    asked = {rank: pid for rank, pid in processes.items() if _file(folder, rank).exists()}  # SIGNAL would kill the others
    begin = {rank: _file(folder, rank).stat().st_size for rank in asked}  # after what somebody else has asked for
    for pid in asked.values():
        _send(pid, SIGNAL)
        if let_go:
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


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.stack"
