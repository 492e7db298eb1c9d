"""What the ranks run in tests of survival: the trainer itself, with ranks that misbehave where `run.name` says.

Not collected by pytest. A file `started-N` appears when N ranks start, and `rank-R.json` says of each which process it is.
`run.name` is a list of words with dots between them:

    kill-RANK-STEP-POINT   that rank is killed with SIGKILL when it first comes to that point of that step
    raise-RANK-STEP-POINT  it raises there, whenever it comes there
    stop-RANK-STEP-POINT   it is sent SIGTERM there
    usr1-RANK-STEP-POINT   it is sent SIGUSR1 there
    soon-RANK-STEP-POINT   it is sent SIGTERM half a second later
    hold-RANK-STEP-POINT   it waits there for ever, the first time; a file `holding` appears
    nap-RANK-STEP-POINT    it waits there for four seconds
    freeze-RANK-STEP-POINT it stops itself there with SIGSTOP, the first time
    lock-RANK-STEP-POINT   a native dead lock there, the first time
    gil-RANK-STEP-POINT    the first time, a thread with a native dead lock that does not give Python's lock back
    slow                   every step takes a third of a second, as long as the file `slow` is in the run directory

Beside the points of a step there is `compile`: a rank needs a kernel that it has not called yet (train.compile=true).
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bagualu.comm.group import Communicator
from bagualu.trainer.operators import kept_code
from bagualu.trainer.recipe.config import Recipe
from tests.standing import train_noting_samples

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
            # To the main thread, which takes it before it does anything else. One to the process may be given to any thread that
            # happens to sleep, and where ranks are threads the run may be over, and another begun, before that one is woken.
            signal.pthread_kill(threading.main_thread().ident, _SENT[kind])
            while not self.stop():
                time.sleep(0.001)
        if kind == "soon":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if kind == "nap":
            time.sleep(4)
        if kind == "raise":
            raise ValueError("no such thing\nand more")
        if kind in _ONCE and not (once := self.folder / f"{kind}-{step}-{point}").exists():
            once.touch()
            _ONCE[kind](self.folder)

    def waits(self, what: str | None) -> None:
        pass


def kill(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_for_ever(folder: Path) -> None:
    (folder / "holding").touch()
    while True:
        time.sleep(0.001)


def native_deadlock(folder: Path) -> None:
    lock_twice(ctypes.CDLL(None))


def beside_a_deadlock(folder: Path) -> None:
    """The main thread comes to its communication or not, as it happens."""
    threading.Thread(target=keeps_the_lock, args=(folder / "keeps-the-lock",), daemon=True).start()
    time.sleep(0.01)


def keeps_the_lock(sign: Path) -> None:
    """A native dead lock in code that does not give Python's lock back."""
    sign.touch()
    lock_twice(ctypes.PyDLL(None))


def lock_twice(libc: ctypes.CDLL) -> None:
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


_ONCE = {"kill": kill, "freeze": freeze, "hold": hold_for_ever, "lock": native_deadlock, "gil": beside_a_deadlock}


def train(recipe: Recipe, communicator: Communicator, stop: Any, scratch: Path | None = None) -> dict[str, Any]:
    folder = Path(recipe.run.dir)
    (folder / f"started-{communicator.size}").touch()
    (folder / f"rank-{communicator.rank}.json").write_text(json.dumps({"pid": os.getpid()}))
    fault, monitor = Fault(recipe, communicator.rank, stop), communicator.monitor
    monitor.observers.append(fault)
    load_or_make = kept_code.load_or_make

    def after_fault(*arguments: Any) -> Any:
        fault.at("compile", monitor.step)
        return load_or_make(*arguments)

    kept_code.load_or_make = after_fault
    before = heavy()
    summary = train_noting_samples(recipe, communicator, stop, scratch)
    (folder / f"heavy-{communicator.rank}.json").write_text(json.dumps([before, heavy()]))
    return summary


def heavy() -> list[str]:
    """What is loaded of the modules that take long."""
    return sorted({"torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy"} & set(sys.modules))
