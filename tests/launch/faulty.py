"""What the ranks run in tests of survival: the trainer itself, with ranks that are killed where `run.name` says.

Not collected by pytest. A file `started-N` appears when N ranks start. `run.name` is a list of words with dots between them:

    kill-RANK-STEP-POINT   that rank is killed with SIGKILL when it first comes to that point of that step
    stop-RANK-STEP-POINT   it is sent SIGTERM there
    usr1-RANK-STEP-POINT   it is sent SIGUSR1 there
    soon-RANK-STEP-POINT   it is sent SIGTERM half a second later
    hold-RANK-STEP-POINT   it waits there for ever; a file `holding` appears
    slow                   every step takes a third of a second, as long as the file `slow` is in the run directory

Beside the points of a step there is `compile`: torch begins to compile something (train.compile=true).
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._dynamo.callback import callback_handler

from bagualu.comm.group import Communicator
from bagualu.trainer import run
from bagualu.trainer.config import Recipe

_SENT = {"stop": signal.SIGTERM, "usr1": signal.SIGUSR1}


class Fault:
    """Observes a rank's monitor."""

    def __init__(self, recipe: Recipe, rank: int, stop: Callable[[], bool]) -> None:
        self.stop, self.folder = stop, Path(recipe.run.dir)
        words = [word.split("-") for word in recipe.run.name.split(".")]
        self.due = {(int(step), point): kind for kind, at, step, point in (w for w in words if len(w) == 4) if int(at) == rank}
        self.slow = ["slow"] in words

    def at(self, point: str, step: int) -> None:
        if point == "data" and self.slow and (self.folder / "slow").exists():
            time.sleep(0.3)
        kind = self.due.pop((step, point), None)
        if kind in _SENT:
            os.kill(os.getpid(), _SENT[kind])
            while not self.stop():  # where ranks are threads, the main thread takes the signal, when it comes to it
                time.sleep(0.001)
        if kind == "soon":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if kind == "hold":
            (self.folder / "holding").touch()
            time.sleep(1000)
        if kind == "kill" and not (once := self.folder / f"killed-{step}-{point}").exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def waits(self, what: str | None) -> None:
        pass


def train(recipe: Recipe, communicator: Communicator, stop: Any, scratch: Path | None = None) -> dict[str, Any]:
    (Path(recipe.run.dir) / f"started-{communicator.size}").touch()
    fault, monitor = Fault(recipe, communicator.rank, stop), communicator.monitor
    monitor.observers.append(fault)
    if recipe.train.compile:
        callback_handler.register_start_callback(lambda _: fault.at("compile", monitor.step))
    return run.train(recipe, communicator, stop, scratch)
