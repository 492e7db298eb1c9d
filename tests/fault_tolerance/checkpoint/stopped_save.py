"""Program: a saving process is stopped (SIGSTOP) at a call, the run starts anew and saves, the other wakes up; one JSON list.

    python stopped_save.py ROOT EVERY

Done for every EVERY-th call of the save. Only forks use torch: its threads do not survive a fork.
"""

import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from checks import content_problems
from power import CALLS
from ranks import rows_of, save_fenced

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError
from bagualu.fault_tolerance.checkpoint.saving.fence import Fence
from bagualu.fault_tolerance.checkpoint.saving.save import Saver

SAVED, REFUSED = 10, 11


def stop_at(n: int) -> None:
    """From now on the n-th of CALLS, over all threads, stops this process."""
    count, lock = [0], threading.Lock()

    def wrap(name: str) -> Callable[..., object]:
        original = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            with lock:
                count[0] += 1
                if count[0] == n + 1:
                    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this very thread, and so not a moment later
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))


def old_start(root: Path, n: int) -> int:
    fence = Fence.take(root)
    save_fenced(fence, 10)
    stop_at(n)
    saver = Saver(fence, Group("world", (0,), 0, None), keep=10)
    saver.start(20, rows_of(20, saver.group), {"step": 20})
    try:
        saver.conclude()
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return SAVED


def new_start(root: Path, report: Path) -> int:
    fence = Fence.take(root)
    there = [path.name for path in list_checkpoints(root)]
    saved = save_fenced(fence, 30, keep=10)
    report.write_text(json.dumps({"there": there, "saved": all(isinstance(path, Path) for path in saved)}))
    return 0


def look(root: Path, report: Path) -> int:
    found = list_checkpoints(root)
    problems = [problem for path in found for problem in content_problems(path)]
    report.write_text(json.dumps({"found": [path.name for path in found], "problems": problems}))
    return 0


def fork(function: Callable[[], int]) -> int:
    child = os.fork()
    if not child:
        try:
            os._exit(function())
        except BaseException:
            traceback.print_exc()
            os._exit(3)
    return child


def done(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, every: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    n = 0
    while True:
        root, report = folder / f"stopped-{n}", folder / f"stopped-{n}.json"
        zombie = fork(lambda root=root, n=n: old_start(root, n))
        _, status = os.waitpid(zombie, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return rows
        assert done(fork(lambda root=root, report=report: new_start(root, report))) == 0
        row = json.loads(report.read_text())
        os.kill(zombie, signal.SIGCONT)
        row["zombie"] = done(zombie)
        assert done(fork(lambda root=root, report=report: look(root, report))) == 0
        rows.append(row | json.loads(report.read_text()))
        shutil.rmtree(root)
        n += every


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
