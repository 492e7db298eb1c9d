"""What the ranks run in tests of storage that stalls or goes away: the trainer itself, with faults of the storage below it.

Not collected by pytest. `run.name` is a list of words with dots between them:

    CALLS-RANKS-STEP       from that step on, calls of these ranks on checkpoints do not return while the file `stalled` is there:
                           write (whatever changes something), fsync, read; RANKS is a digit, or `all`
    again-N                the N-th start of the ranks (from 1) removes `stalled` and runs `../mount`, if that is there
    lose-STEP, find-STEP   before that step rank 0 runs the program `../unmount`, `../mount`
    kill-STEP              and before that one rank 1 is killed, once

`stalled` lies beside the run directory, and so does `starts-RANK`, with one line for each start.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bagualu.comm.group import Communicator
from bagualu.trainer.recipe.config import Recipe
from tests.standing import train_noting_samples

CALLS = {
    "write": ("write", "fsync", "mkdir", "rename", "replace", "unlink"),
    "fsync": ("fsync",),
    "read": ("read", "scandir", "stat"),
}


def stall(kind: str, folder: Path, flag: Path) -> None:
    """Calls of this kind on what is below `folder` wait as long as `flag` is there."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            while str(path).startswith(str(folder)) and flag.exists():
                time.sleep(0.05)
            return original(target, *args, **kwargs)

        return call

    for name in CALLS[kind]:
        setattr(os, name, wrap(getattr(os, name)))
    opened = os.open

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        while str(path).startswith(str(folder)) and kind == ("write" if writes else "read") and flag.exists():
            time.sleep(0.05)
        return opened(path, flags, *args, **kwargs)

    os.open = open_  # type: ignore[assignment]


class Faults:
    """Observes a rank's monitor."""

    def __init__(self, recipe: Recipe, rank: int) -> None:
        self.folder, self.rank = Path(recipe.run.dir), rank
        self.words = [word.split("-") for word in recipe.run.name.split(".")]
        starts = self.folder.parent / f"starts-{rank}"
        with starts.open("a") as file:
            file.write("started\n")
        self.start = len(starts.read_text().splitlines())
        self.stalled = False
        if ["again", str(self.start)] in self.words and rank == 0:
            self.flag.unlink(missing_ok=True)
            self.program("mount")
        if self.start > 1:
            self.begin_stalls(10**9)

    @property
    def flag(self) -> Path:
        return self.folder.parent / "stalled"

    def program(self, name: str) -> None:
        path = self.folder.parent / name
        if path.exists():
            subprocess.run([str(path)], check=True)

    def begin_stalls(self, step: int) -> None:
        """Only the main thread looks for it: the writer's own calls begin to wait at once."""
        for word in self.words:
            if word[0] in CALLS and word[1] in ("all", str(self.rank)) and step >= int(word[2]) and not self.stalled:
                self.stalled = True
                if self.start == 1:
                    self.flag.touch()
                stall(word[0], self.folder / "checkpoints", self.flag)

    def at(self, point: str, step: int) -> None:
        if point != "data" or self.start > 1:
            return
        self.begin_stalls(step)
        for name, program in (("lose", "unmount"), ("find", "mount")):
            if [name, str(step)] in self.words and self.rank == 0:
                self.program(program)
        if ["kill", str(step)] in self.words and self.rank == 1:
            while ["lose", str(step)] in self.words and os.path.ismount(self.folder / "checkpoints"):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    def waits(self, what: str | None) -> None:
        pass


def train(recipe: Recipe, communicator: Communicator, stop: Any, scratch: Path | None = None) -> dict[str, Any]:
    faults = Faults(recipe, communicator.rank)
    communicator.world.barrier()
    communicator.monitor.observers.append(faults)
    return train_noting_samples(recipe, communicator, stop, scratch)
