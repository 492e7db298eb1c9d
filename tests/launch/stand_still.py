"""What the ranks run in the tests of the watchdog, in place of the trainer: short steps, until one of them stands still.

Not collected by pytest. `run.name` says how, on rank 2 in step 5 (counted from 1): spin, lock, gil; first: spin, in
step 1; slow: nobody stands still, but a first step, a validation and a load take longer than restart.hang_seconds.
"""

import ctypes
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.group import Communicator
from bagualu.trainer.config import Recipe


def train(recipe: Recipe, communicator: Communicator, stop: Any, scratch: Path | None = None) -> dict[str, Any]:
    folder, rank, monitor, step = Path(recipe.run.dir), communicator.rank, communicator.monitor, 0
    (folder / f"rank-{rank}.json").write_text(json.dumps({"pid": os.getpid()}))
    stopping = torch.zeros(1)
    tensor = communicator.group((rank // 2 * 2, rank // 2 * 2 + 1), "tensor")
    if rank == 1 and recipe.run.name == "slow":
        monitor.at("load")
        time.sleep(4)
    while step < recipe.train.steps and not stopping.item():
        step += 1
        monitor.step = step
        monitor.at("data")
        tensor.all_reduce(torch.zeros(1))
        monitor.at("forward")
        if rank == 2:
            misbehave(recipe.run.name, step, monitor.at, folder)
        time.sleep(0.02)
        stopping.fill_(float(stop()))
        communicator.world.all_reduce(stopping, "max")
        if rank == 0:
            with (folder / "metrics.jsonl").open("a") as metrics:
                print(json.dumps({"step": step}), file=metrics)
    ended = "stopped" if stopping.item() else "done"
    return {"ended": ended, "step": step, "steps": recipe.train.steps, "loss": 1.5, "run_dir": recipe.run.dir}


def misbehave(how: str, step: int, at: Any, folder: Path) -> None:
    if how == "slow" and step == 1:  # compilation
        time.sleep(4)
    if how == "slow" and step == 3:
        at("validate")
        time.sleep(4)
    if (step, how) in ((1, "first"), (5, "spin")):
        computes_for_ever()
    if step == 5 and how == "lock":
        native_deadlock()
    if step == 5 and how == "gil":  # the main thread comes to its communication or not, as it happens
        threading.Thread(target=keeps_the_lock, args=(folder / "keeps-the-lock",), daemon=True).start()
        time.sleep(0.01)


def computes_for_ever() -> None:
    while True:
        time.sleep(0.001)


def native_deadlock() -> None:
    lock_twice(ctypes.CDLL(None))


def keeps_the_lock(sign: Path) -> None:
    """A native dead lock in code that does not give Python's lock back."""
    sign.touch()
    lock_twice(ctypes.PyDLL(None))


def lock_twice(libc: ctypes.CDLL) -> None:
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
