"""A run in a mount namespace of its own, which `script` is started in. It writes FOLDER/found.json, and leaves a copy of the run in
FOLDER/run.

Trains on a small disk of its own, which another job fills in step 6 and makes room on when the run has been started for the fourth
time. Meanwhile a rank fails, so that the run is started again on a disk without room.
"""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.fault_tolerance.ledger.events import read
from bagualu.launch.cli import main
from bagualu.trainer.recipe.config import Recipe
from tests.standing import train_noting_samples

RECIPE = [
    "recipe=tiny_dense", "data.source=random", "data.sequence_length=8", "data.global_batch=8", "train.micro_batch=1",
    "model.layers=2", "model.hidden=8", "model.heads=2", "model.kv_heads=2", "model.ffn=16", "model.vocab=64", "train.steps=30",
    "train.validation_sequences=0", "train.validate_every=0", "parallel.data=2", "checkpoint.every=2", "launch.threads=1",
    "restart.backoff_seconds=0", "log.progress=off", "checkpoint.async=false",
]  # fmt: skip
FULL_FROM, FAILS_IN = 6, 26
"""Long enough for metrics and ledger to come to the end of the pages that they have: 230 and 330 bytes a step."""


def fill(folder: Path) -> None:
    """To the last byte of the last page."""
    descriptor = os.open(folder / "of-another-job", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(descriptor, bytes(4096)):
            pass
    os.close(descriptor)


class OtherJob:
    """An observer of rank 0 that fills the disk, and of rank 1 that fails while it is full."""

    def __init__(self, rank: int, disk: Path, start: int) -> None:
        self.rank, self.disk, self.start = rank, disk, start

    def at(self, point: str, step: int) -> None:
        if self.start == 1 and (self.rank, point, step) == (0, "backward", FULL_FROM):
            fill(self.disk)
        if self.start == 1 and (self.rank, point, step) == (1, "backward", FAILS_IN):
            raise RuntimeError("while the disk was full")

    def waits(self, what: str | None) -> None:
        return None


def train(recipe: Recipe, communicator: Communicator, stop: Callable[[], bool], scratch: Path | None = None) -> dict[str, Any]:
    disk = Path(recipe.run.dir).parent
    starts = disk.parent / f"starts-{communicator.rank}"
    start = starts.stat().st_size + 1 if starts.exists() else 1
    starts.write_bytes(bytes(start))
    if start == 4 and communicator.rank == 0:
        (disk / "of-another-job").unlink()
    communicator.world.barrier()
    communicator.monitor.observers.append(OtherJob(communicator.rank, disk, start))
    return train_noting_samples(recipe, communicator, stop, scratch, disk.parent)


def on_small_disk(folder: Path, *words: str) -> dict[str, Any]:
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], check=True)
    code = main(["train", *RECIPE, *words, f"run.dir={disk}/run"], "full_disk:train")
    shutil.copytree(disk / "run", folder / "run")
    for notes in folder.glob("samples-*.jsonl"):
        notes.rename(folder / "run" / notes.name)
    full = folder / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(full)], check=True)
    fill(full)
    refused = main(["train", *RECIPE, *words, f"run.dir={full}/run"], "full_disk:train")
    checkpoints = list_checkpoints(disk / "run" / "checkpoints")
    return {
        "code": code, "refused": refused, "starts": [(folder / f"starts-{rank}").stat().st_size for rank in (0, 1)],
        "failures": [event.step for event in read(disk / "run") if event.what == "failed"],
        "checkpoints": [path.name for path in checkpoints], "problems": [verify(path) for path in checkpoints],
    }  # fmt: skip


def script(folder: str, backend: str, *words: str) -> None:
    found = on_small_disk(Path(folder), f"comm.backend={backend}", *words)
    (Path(folder) / "found.json").write_text(json.dumps(found))
