"""Loading the state of a run: Bagualu, every byte verified, against torch.load and torch.distributed.checkpoint.load.

    python tests/bench/checkpoint_load.py --recipe bench_dense_124m --json out.json

One process on all cores, the same values in files in the page cache, all contestants in turn in every round (A B C A B C ...).
The state is weights and moments in float32. `bagualu` and `torch.load` fill fresh tensors; `bagualu-run` also puts them into a
live model and optimizer (`trainer.state.take_state`), as dcp.load does with the tensors that it is given.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from contest.environment import ALLOCATORS, environment, machine, versions

from bagualu.comm import simulated
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.shard import key_of
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.checkpoint.saving.save import save
from bagualu.parallel.boxes import TensorPiece
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recovery.state import checkpoints_of, metadata_of, take_state

_READY = "BENCH_CHECKPOINT_LOAD_READY"


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bench_dense_124m", metavar="RECIPE")
    parser.add_argument("--rounds", type=int, default=5, help="times every contestant gets its turn (default 5)")
    parser.add_argument("--folder", type=Path, help="where the files are written, and removed again (default: a new one in /tmp)")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="tuned", help="C allocator settings of all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and every sample here")
    return parser.parse_args(argv)


def read_fresh(path: Path, threads: int) -> None:
    """Every tensor of the checkpoint in fresh memory."""
    checkpoint = Checkpoint(path)
    outs = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors.items()}
    checkpoint.read_all((TensorPiece(name, tuple(out.shape), (0,) * out.dim(), out) for name, out in outs.items()), threads)


def contestants(parts: TrainerState, folder: Path) -> dict[str, Callable[[], object]]:
    """Write the state in every form, and what reads it back."""
    cores = torch.get_num_threads()
    world = parts.mesh.group("world")
    path = save(checkpoints_of(parts), 1, parts.engine.pieces(), metadata_of(parts, 1), world, keep=1)
    state = {key_of(piece): piece.tensor.detach().clone() for piece in parts.engine.pieces()}
    torch.save(state, folder / "state.pt")
    dcp.save(state, checkpoint_id=folder / "dcp")
    return {
        "torch.load": lambda: torch.load(folder / "state.pt", weights_only=True),
        "dcp.load": lambda: dcp.load(state, checkpoint_id=folder / "dcp"),
        "bagualu": lambda: read_fresh(path, cores),
        "bagualu-1-thread": lambda: read_fresh(path, 1),
        "bagualu-run": lambda: take_state(parts, lambda: Checkpoint(path)),
    }


def measure(communicator: Communicator, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    recipe = compose([f"recipe={options.recipe}", "data.source=random", "train.dtype=float32", "parallel.data=1",
                      "comm.backend=simulated", f"run.dir={folder}"])  # fmt: skip
    parts = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    count = sum(piece.tensor.numel() * piece.tensor.element_size() for piece in parts.engine.pieces())
    timed = contestants(parts, folder)
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(options.rounds + 1):  # the first one brings the files into the page cache
        for name, load in timed.items():
            started = time.perf_counter()
            load()
            if turn:
                samples[name].append(time.perf_counter() - started)
    return {"bytes": count, "samples": samples}


def table(recipe: str, figures: dict[str, Any]) -> str:
    medians = {name: statistics.median(seconds) for name, seconds in figures["samples"].items()}
    lines = [f"{recipe}: {figures['bytes'] / 1e9:.2f} GB",
             f"{'':<18}{'seconds':>9}{'min..max':>14}{'GB/s':>7}{'x torch.load':>14}{'x dcp.load':>12}"]  # fmt: skip
    for name, seconds in medians.items():
        taken = figures["samples"][name]
        spread = f"{min(taken):.2f}..{max(taken):.2f}"
        ratios = [f"{medians[other] / seconds:.2f}" for other in ("torch.load", "dcp.load")]
        rate = figures["bytes"] / seconds / 1e9
        lines.append(f"{name:<18}{seconds:>9.3f}{spread:>14}{rate:>7.2f}{ratios[0]:>14}{ratios[1]:>12}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    options = arguments(argv)
    if _READY not in os.environ:  # the allocator reads its settings when a process begins
        wanted = environment(len(os.sched_getaffinity(0)), options.allocator) | {_READY: "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)
    folder = Path(tempfile.mkdtemp(prefix="bench-load-", dir=options.folder))
    cores = len(os.sched_getaffinity(0))
    try:
        (figures,) = simulated.run(1, lambda communicator: measure(communicator, options, folder), threads=cores)
    finally:
        shutil.rmtree(folder)
    print(table(options.recipe, figures))
    if options.json:
        document = {
            "machine": machine(),
            "versions": versions(),
            "recipe": options.recipe,
            "allocator": options.allocator,
            **figures,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
