"""What the ranks run in the launcher's own tests, in place of the trainer: steps that only communicate and sleep.

Not collected by pytest. `run.name` says how it misbehaves: raise2 raises on rank 2 in step 3; deaf never stops; leave1
ends the process of rank 1 there with exit code 9; child has a child process and says at the end whether that still runs.
"""

import gc
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.group import Communicator
from bagualu.comm.monitor import Phase
from bagualu.trainer.recipe.config import Recipe


def train(recipe: Recipe, communicator: Communicator, stop: Any, scratch: Path | None = None) -> dict[str, Any]:
    folder, rank, step = Path(recipe.run.dir), communicator.rank, 0
    stopping = torch.zeros(1)
    (folder / f"rank-{rank}.json").write_text(json.dumps({**_about(), "scratch": str(scratch)}))
    print(f"rank {rank} says hello", flush=True)
    child = subprocess.Popen(["sleep", "600"]) if recipe.run.name == "child" else None
    while step < recipe.train.steps and not stopping.item():
        step += 1
        communicator.monitor.step = step
        communicator.monitor.at(Phase.DATA)
        time.sleep(0.02)
        if recipe.run.name == f"raise{rank}" and step == 3:
            raise ValueError("no such thing\nand more")
        if recipe.run.name == f"leave{rank}" and step == 3:
            os._exit(9)
        stopping.fill_(float(stop() and recipe.run.name != "deaf"))
        communicator.world.all_reduce(stopping, "max")
        if rank == 0:
            with (folder / "metrics.jsonl").open("a") as metrics:
                print(json.dumps({"step": step}), file=metrics)
            start, end = ("\r", "") if sys.stderr.isatty() else ("", "\n")
            print(f"{start}at step {step}", end=end, file=sys.stderr, flush=True)
    if child:
        (folder / f"child-{rank}").write_text(str(child.poll()))
        child.kill()
        child.wait()
    ended = "stopped" if stopping.item() else "done"
    return {"ended": ended, "step": step, "steps": recipe.train.steps, "loss": 1.5, "run_dir": recipe.run.dir}


def _about() -> dict[str, Any]:
    memory = torch.zeros(16 * 2**20)  # 64 MB
    pages = Path("/proc/self/smaps_rollup").read_text()
    huge_kilobytes = re.search(r"AnonHugePages:\s+(\d+)", pages)
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0)),
        "huge_bytes": int(huge_kilobytes[1]) * 1024 if huge_kilobytes else 0,
        "terminal": sys.stderr.isatty(),
        "elements": memory.numel(),
        "collector": (gc.isenabled(), gc.get_freeze_count(), gc.get_stats()[1]["collections"]),
    }
