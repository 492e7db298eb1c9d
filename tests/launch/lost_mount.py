"""A run in a mount namespace of its own: run_as_root("tests.launch.lost_mount", [FOLDER, WHAT], "mounts", ...).

The checkpoints of a run of 4 Gloo ranks lie on a mount of their own, which goes away and comes back (`remount`), stays away
(`unmount`), or on a file system that is read-only (`read-only`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bagualu.launch.cli import main
from tests.launch.survival import FOUR, SMALL

WORDS = [*SMALL, *FOUR, "checkpoint.keep=9", "log.progress=off", "checkpoint.async=false", "restart.backoff_seconds=0"]


def train(folder: Path, *words: str) -> int:
    return main(["train", *WORDS, f"run.dir={folder}/run", *words], "lost_storage:train")


def prepare(folder: Path) -> Path:
    """The mount point; its contents lie in `stored`, whatever is mounted where."""
    point = folder / "run" / "checkpoints"
    (folder / "stored").mkdir()
    point.mkdir(parents=True)
    for name, words in (("mount", f"mount --bind {folder}/stored {point}"), ("unmount", f"umount --lazy {point}")):
        (folder / name).write_text(f"#!/bin/sh\nexec {words}\n")
        (folder / name).chmod(0o755)
    subprocess.run([folder / "mount"], check=True)
    return point


def remount(folder: Path) -> dict[str, Any]:
    """Away in steps 5 and 6, then again from step 8, in which a rank is killed, until the second start after that."""
    code = train(folder, "run.name=lose-5.find-7.lose-8.kill-8.again-3", "restart.limit=3")
    return {"code": code}


def unmount(folder: Path) -> dict[str, Any]:
    """From step 5 on; nothing brings it back but the end of the run."""
    code = train(folder, "run.name=lose-5", "restart.limit=1")
    again = train(folder, "run.name=lose-5", "checkpoint.resume=true")
    below = sorted(os.listdir(folder / "run" / "checkpoints"))
    metrics = (folder / "run" / "metrics.jsonl").read_text().count("\n")
    subprocess.run([folder / "mount"], check=True)
    resumed = train(folder, "run.name=undisturbed", "checkpoint.resume=true")
    return {"code": code, "again": again, "below": below, "metrics": metrics, "resumed": resumed}


def read_only(folder: Path) -> dict[str, Any]:
    """The run directory, new and with a run in it; then the checkpoints alone."""
    first = train(folder, "run.name=undisturbed", "train.steps=3")
    codes = []
    for place in (folder / "run", folder / "run" / "checkpoints"):
        subprocess.run(["mount", "--bind", place, place], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
        print("-- refused", file=sys.stderr, flush=True)
        codes.append(train(folder, "run.name=undisturbed", "checkpoint.resume=true"))
        codes.append(train(folder, "run.name=undisturbed"))
        if place.name == "run":
            codes.append(main(["train", *WORDS, f"run.dir={place}/new"], "lost_storage:train"))
        subprocess.run(["umount", place], check=True)
    starts = (folder / "starts-0").read_text().count("\n")
    print("-- resumed", file=sys.stderr, flush=True)
    resumed = train(folder, "run.name=undisturbed", "checkpoint.resume=true")
    return {"first": first, "codes": codes, "starts": starts, "resumed": resumed}


def script(folder: str, what: str) -> None:
    """Writes FOLDER/found.json."""
    place = Path(folder)
    prepare(place)
    document = {"remount": remount, "unmount": unmount, "read-only": read_only}[what](place)
    (place / "found.json").write_text(json.dumps(document))
