"""What checkpoints cost: the stall that training sees, and the speed of a save against torch.save and torch.distributed.checkpoint.

    python tests/bench/checkpoint.py stall --recipe bench_dense_124m --rounds 3
    python tests/bench/checkpoint.py save --megabytes 1500 --rounds 3 --folder /some/disk

`stall`: blocks of steps take turns, without a save and with one begun before the first step and written during them. `save`: the
same float32 tensors by each way in turn; `synced` waits for the disk (fsync), as a checkpoint must, `cached` does not.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from contest.environment import machine, versions

from bagualu.comm.group import Group, connect
from bagualu.comm.world import World
from bagualu.fault_tolerance.checkpoint.saving.fence import Fence
from bagualu.fault_tolerance.checkpoint.saving.save import Saver
from bagualu.parallel.boxes import TensorPiece
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recovery.saving import Checkpoints, take_checkpoints
from bagualu.trainer.step import train_step

INTERVAL = 20
"""Steps between checkpoints that the stall is reckoned for."""
TENSORS = 96


def stall(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of a block of steps without and with a save, and what a save costs a step at INTERVAL."""
    overrides = [f"recipe={options.recipe}", f"run.dir={folder}", "parallel.data=1", *options.override]
    recipe = compose(overrides)
    communicator = connect("gloo", World(0, 1))
    parts = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    checkpoints = Checkpoints(parts, take_checkpoints(parts))
    done = 0

    def block(saved: bool) -> float:
        nonlocal done
        started = time.perf_counter()
        if saved:
            checkpoints.save(done)
        for _ in range(options.steps):
            result = train_step(parts, done, saving=checkpoints.status)
            done += 1
            checkpoints.settle(result.saving)
        checkpoints.finish()
        return time.perf_counter() - started

    block(saved=True)  # warms up both
    without, saving, boundary = [], [], []
    for _ in range(options.rounds):
        without.append(block(saved=False))
        before = checkpoints.seconds
        saving.append(block(saved=True))
        boundary.append(checkpoints.seconds - before)
    step = median(without) / options.steps
    cost = median(saving) - median(without)
    return {
        "step_seconds": step,
        "block_seconds": {"without": without, "saving": saving},
        "save_costs_seconds": cost,
        "boundary_seconds": boundary,
        "stall_of_a_step": cost / INTERVAL / step,
        "boundary_of_a_step": median(boundary) / INTERVAL / step,
        "bytes": sum(p.tensor.numel() * p.tensor.element_size() for p in parts.engine.pieces()),
    }


def save(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of each way to write the same tensors."""
    rows = options.megabytes * 10**6 // 4 // TENSORS // 1024
    tensors = {f"tensor-{index}": torch.randn(rows, 1024) for index in range(TENSORS)}
    size = sum(tensor.numel() * 4 for tensor in tensors.values())
    fences: list[Fence] = []
    ways: dict[str, Callable[[Path], None]] = {
        "bagualu, hashed, synced": lambda path: own(fences[-1], tensors),
        "torch.save, synced": lambda path: plain(path, tensors, sync=True),
        "torch.save, cached": lambda path: plain(path, tensors, sync=False),
        "distributed.checkpoint, synced": lambda path: distributed(path, tensors, sync=True),
        "distributed.checkpoint, cached": lambda path: distributed(path, tensors, sync=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name, write in ways.items():
            path = folder / f"target-{turn}"
            if name.startswith("bagualu"):
                fences.append(Fence.take(path))  # once a start, not once a save
            os.sync()  # nobody pays for the one before
            started = time.perf_counter()
            write(path)
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {"bytes": size, "seconds": seconds}


def own(fence: Fence, tensors: dict[str, torch.Tensor]) -> None:
    saver = Saver(fence, Group("world", (0,), 0, None), keep=1)
    pieces = [TensorPiece(name, tuple(tensor.shape), (0, 0), tensor) for name, tensor in tensors.items()]
    saver.start(1, pieces, {})
    saver.conclude()
    saver.close()


def plain(path: Path, tensors: dict[str, torch.Tensor], sync: bool) -> None:
    with path.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def distributed(path: Path, tensors: dict[str, torch.Tensor], sync: bool) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path, sync_files=sync), no_dist=True)


def table(what: str, found: dict[str, Any]) -> str:
    if what == "stall":
        rows = [
            ("state", f"{found['bytes'] / 1e6:,.0f} MB"),
            ("step", f"{found['step_seconds']:.2f} s"),
            ("a save costs training", f"{found['save_costs_seconds']:.2f} s"),
            ("of it at step boundaries", f"{median(found['boundary_seconds']):.2f} s"),
            (f"stall at an interval of {INTERVAL}, of a step", f"{found['stall_of_a_step']:.1%}"),
            ("of it at step boundaries", f"{found['boundary_of_a_step']:.1%}"),
        ]
        return "\n".join(f"{name:<42}{value:>14}" for name, value in rows)
    base = median(found["seconds"]["bagualu, hashed, synced"])
    lines = [f"{'way':<34}{'s (min..max)':>24}{'MB/s':>9}{'bagualu is':>12}"]
    for name, seconds in found["seconds"].items():
        middle = median(seconds)
        spread = f"{middle:.2f} ({min(seconds):.2f}..{max(seconds):.2f})"
        lines.append(f"{name:<34}{spread:>24}{found['bytes'] / 1e6 / middle:>9,.0f}{middle / base:>11.2f}x")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stall", "save"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipe", default="bench_dense_124m", help="stall: recipe (default bench_dense_124m)")
    parser.add_argument("--steps", type=int, default=4, help="stall: steps of a block; the write must fit in (default 4)")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="stall: change the recipe")
    parser.add_argument("--megabytes", type=int, default=1500, help="save: bytes to write (default 1500)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary directory)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=options.folder) as folder:
        found = {"stall": stall, "save": save}[options.what](options, Path(folder))
    print(table(options.what, found))
    if options.json:
        document = {"machine": machine(), "versions": versions(), options.what: found}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
