"""Program for a mount namespace of its own: `unshare -rm python small_disk.py FOLDER`; prints one JSON document.

Storage that is full, read-only, taken away and given back, under a run that saves in the background every few steps.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from ranks import run

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.fault_tolerance.checkpoint.saving.fence import Fence
from bagualu.fault_tolerance.checkpoint.saving.save import Saver, take_fence
from bagualu.parallel.boxes import TensorPiece


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def pieces(step: int, group: Group, megabytes: float) -> list[TensorPiece]:
    rows = int(megabytes * 2**18)
    values = torch.full((rows,), float(step))
    return [TensorPiece("w", (rows * group.size,), (rows * group.rank,), values)]


def attempt(fence: Fence, step: int, megabytes: float) -> str:
    """What all ranks agree to have come of a save: "saved", or the error."""

    def one(group: Group) -> str:
        saver = Saver(fence, group, keep=2)
        try:
            saver.start(step, pieces(step, group, megabytes), {"step": step})
            saver.conclude()
            return "saved"
        except CheckpointError as error:
            return str(error)
        finally:
            saver.close()

    results = run(2, one)
    assert len(set(results)) == 1, results
    return str(results[0])


def main(folder: Path) -> dict[str, Any]:
    root = folder / "root"
    root.mkdir()
    mount("-t", "tmpfs", "-o", "size=6m", "none", str(root))
    fence = Fence.take(root)
    found: dict[str, Any] = {"first": attempt(fence, 10, 1.0)}
    before = {path.name: path.read_bytes() for path in (root / "step-00000010").iterdir()}
    found["full"] = attempt(fence, 20, 2.5)
    found["left when full"] = sorted(path.name for path in root.iterdir())
    found["old intact"] = before == {path.name: path.read_bytes() for path in (root / "step-00000010").iterdir()}
    found["freed"] = attempt(fence, 30, 1.0)
    mount("-o", "remount,ro", str(root))
    found["read-only"] = attempt(fence, 40, 0.1)
    found["read-only start"] = run(2, lambda group: take_fence(root, group))
    found["read-only start"] = [str(error) for error in found["read-only start"]]
    mount("-o", "remount,rw", str(root))
    hidden = folder / "hidden"
    hidden.mkdir()
    mount("--move", str(root), str(hidden))
    found["taken away"] = attempt(fence, 40, 0.1)
    found["left below the mount"] = sorted(path.name for path in root.iterdir())
    mount("--move", str(hidden), str(root))
    found["back"] = attempt(fence, 50, 0.1)
    newest = latest(root)
    assert newest is not None
    found["newest"], found["problems"] = newest.name, verify(newest)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]))))
