"""Program: save in the background with two ranks, killed at every system call that changes or syncs a file; prints one JSON list.

    python killed_save.py ROOT

ROOT gets step 10. For every n, a child on a copy of it saves step 20 with keep=1 and dies at its n-th call: before it,
or in the midst of it for a write. Then: what `latest` gives, whether it is whole and read back as that step; and
whether the next save works and leaves nothing behind.
"""

import json
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from ranks import run, save_while_training, tensors

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH
from bagualu.fault_tolerance.checkpoint.saving.save import Saver, take_fence
from bagualu.fault_tolerance.checkpoint.saving.snapshot import Snapshot

CALLS = ("open", "write", "fsync", "close", "rename", "mkdir", "unlink", "rmdir")


def save_step(root: Path, step: int) -> list[object]:
    def one(group: Group) -> object:
        saver = Saver(take_fence(root, group), group, keep=1)
        try:
            return save_while_training(saver, step, Snapshot())[0]
        finally:
            saver.close()

    return run(2, one)


def die_at(n: int) -> None:
    """From now on the n-th of CALLS, over all threads, ends this process."""
    count, lock = [0], threading.Lock()

    def wrap(name):
        original = getattr(os, name)

        def call(*args, **kwargs):
            with lock:
                if count[0] == n:
                    if name == "write":
                        original(args[0], args[1][: len(args[1]) // 2])
                    os._exit(9)
                count[0] += 1
                return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))


def succeeded(results: list[object]) -> bool:
    return all(isinstance(path, Path) for path in results)


def killed_save(root: Path, n: int) -> int:
    die_at(n)
    return 0 if succeeded(save_step(root, 20)) else 1


def look(root: Path, report: Path) -> int:
    """Write down what is there and what the next save makes of it."""
    path = latest(root)
    checkpoint = Checkpoint(path)
    intact = verify(path) == [] and checkpoint.metadata == {"step": checkpoint.step}
    for name, expected in tensors(checkpoint.step).items():
        out = torch.empty_like(expected)
        checkpoint.read(name, (0,) * out.dim(), out)
        intact &= torch.equal(out, expected)
    saved = succeeded(save_step(root, 30))
    left = sorted(path.name for path in root.iterdir() if path.name != EPOCH)
    report.write_text(json.dumps({"step": checkpoint.step, "intact": intact, "saved": saved, "left": left}))
    return 0


def in_child(function: Callable[[], int]) -> int:
    """Exit code of a fork that calls `function`. Only they use torch: its threads do not survive a fork."""
    child = os.fork()
    if not child:
        try:
            os._exit(function())
        except BaseException:
            traceback.print_exc()
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(original: Path) -> None:
    assert in_child(lambda: 0 if succeeded(save_step(original, 10)) else 1) == 0
    rows, code = [], 9
    while code == 9:
        root = original.with_name(f"killed-{len(rows)}")
        report = root.with_suffix(".json")
        shutil.copytree(original, root)
        code = in_child(lambda root=root: killed_save(root, len(rows)))
        assert in_child(lambda root=root, report=report: look(root, report)) == 0
        rows.append({"code": code, **json.loads(report.read_text())})
    print(json.dumps(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
