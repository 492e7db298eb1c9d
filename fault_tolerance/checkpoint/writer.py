"""The one thread of a rank that touches the checkpoint storage: what does not answer stalls no step. Free of torch."""

import queue
import threading
from collections.abc import Callable
from typing import Any

from bagualu.fault_tolerance.checkpoint.format import CheckpointError, CheckpointStorageError, SupersededError

Outcome = dict[str, Any]
"""{"done": what a job returned} or {"error": in one line why not, "kind": one of KINDS}: it can be sent to other ranks as JSON."""
KINDS: dict[str, type[CheckpointError]] = {
    "superseded": SupersededError, "other": CheckpointError, "storage": CheckpointStorageError,
}  # fmt: skip
"""What an error means; of several the first of these is told, since nothing but storage is worth trying again."""


class Job:
    """A call on its way through the thread."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._function, self._args = function, args
        self._finished = threading.Event()
        self.outcome: Outcome | None = None
        """None until it is finished."""

    def run(self) -> None:
        """Called once, by the thread. Whatever ends the call is an outcome: nothing goes by in silence."""
        try:
            self.outcome = {"done": self._function(*self._args)}
        except BaseException as error:
            name = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
            self.outcome = {"error": f"{name}{error}".replace("\n", " "), "kind": _kind(error)}
        self._function, self._args = _nothing, ()  # the tensors may go
        self._finished.set()

    def wait(self, seconds: float) -> Outcome:
        """Its outcome; an error once it has not been finished for `seconds`."""
        self._finished.wait(max(0.0, seconds))
        return self.outcome or {
            "error": "the storage has not answered for checkpoint.timeout_seconds; see whether it hangs", "kind": "storage",
        }  # fmt: skip


class Writer:
    """Runs jobs one after the other. A job that hangs holds up the later ones, and nobody else."""

    def __init__(self, rank: int) -> None:
        self._name = f"checkpoint-writer-{rank}"
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[..., Any], *args: Any) -> Job:
        """Run function(*args) after everything submitted before."""
        if self._thread is None:
            # A daemon: a process that ends does not wait for storage that hangs.
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        job = Job(function, *args)
        self._jobs.put(job)
        return job

    def rest(self, seconds: float) -> None:
        """Wait until everything submitted is done, for at most `seconds`."""
        self.submit(_nothing).wait(seconds)

    def close(self, seconds: float) -> None:
        """Let everything submitted finish, for at most `seconds`; nothing is submitted after it."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(max(0.0, seconds))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()


def _kind(error: BaseException) -> str:
    if isinstance(error, OSError | CheckpointStorageError):
        return "storage"
    return "superseded" if isinstance(error, SupersededError) else "other"


def _nothing() -> None:
    return None
