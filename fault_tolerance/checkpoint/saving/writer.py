"""A thread that does all of a rank's work on checkpoint storage, so that storage that does not respond delays no step."""

import queue
import threading
from collections.abc import Callable
from typing import Any

from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError, CheckpointStorageError, SupersededError

Outcome = dict[str, Any]
"""The result of a job: {"done": what its function returned} or {"error": a line of text, "kind": a key of KINDS}; plain JSON, so
that it can be sent to other ranks."""
KINDS: dict[str, type[CheckpointError]] = {
    "superseded": SupersededError, "other": CheckpointError, "storage": CheckpointStorageError,
}  # fmt: skip
"""The exception for each kind of error. If ranks fail with several kinds, the first in this order is raised. So "storage", after
which another attempt is worthwhile, is raised only if all errors are of that kind."""


class Job:
    """A function call for the writer thread."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._function, self._args = function, args
        self._finished = threading.Event()
        self.outcome: Outcome | None = None
        """The result or error of the call; None until it has finished."""

    def run(self) -> None:
        """Makes the call and stores its result, or any exception, in `outcome`. Runs once, in the writer thread."""
        try:
            self.outcome = {"done": self._function(*self._args)}
        except BaseException as error:
            name = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
            self.outcome = {"error": f"{name}{error}".replace("\n", " "), "kind": _kind(error)}
        self._function, self._args = _nothing, ()  # frees the tensors
        self._finished.set()

    def wait(self, seconds: float) -> Outcome:
        """Waits for the call and returns its outcome; if it has not finished within `seconds`, returns an outcome with an error of
        kind "storage"."""
        self._finished.wait(max(0.0, seconds))
        return self.outcome or {
            "error": "the storage has not answered for checkpoint.timeout_seconds; see whether it hangs", "kind": "storage",
        }  # fmt: skip


class Writer:
    """Runs jobs one after the other in a thread. A job that hangs delays only later jobs."""

    def __init__(self, rank: int) -> None:
        self._name = f"checkpoint-writer-{rank}"
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[..., Any], *args: Any) -> Job:
        """Queues a call of function(*args), to be made after all calls submitted before, and returns its job without waiting."""
        if self._thread is None:
            # A daemon thread, so that a process can end while storage hangs.
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        job = Job(function, *args)
        self._jobs.put(job)
        return job

    def rest(self, seconds: float) -> None:
        """Waits, at most `seconds`, until all jobs submitted so far have ended."""
        self.submit(_nothing).wait(seconds)

    def close(self, seconds: float) -> None:
        """Ends the thread after all jobs submitted so far and waits for that, at most `seconds`. Nothing may be submitted
        afterwards."""
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
