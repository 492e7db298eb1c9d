"""Reads the samples of the next steps while a step is computed."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from bagualu.trainer.data.config import DataConfig

T = TypeVar("T")
_MOST, _MOST_SECONDS = 0.01, 0.1
"""The share of their time, and the seconds in all, that steps may wait for data without a remark."""


def waiting(data_seconds: float, seconds: float, config: DataConfig) -> str | None:
    """Returns a line for people if steps of `seconds` in all have waited long for data, `data_seconds`; else None."""
    if data_seconds <= max(_MOST * seconds, _MOST_SECONDS):
        return None
    return (f"data: steps waited {data_seconds / seconds:.1%} of their time for data on rank 0; put it on faster storage, or give "
            f"data.workers={max(1, 2 * config.workers)}")  # fmt: skip


class ReadAhead(Generic[T]):
    """Returns what each step of a run reads. `read(step)` reads it, for steps from 0 to `steps` - 1, and depends on nothing else.
    `workers` threads read as many steps ahead of the step that was asked for last; 0: none is read ahead."""

    def __init__(self, read: Callable[[int], T], steps: int, workers: int) -> None:
        self._read, self._steps, self._workers = read, steps, workers
        self._pool = ThreadPoolExecutor(workers, "data") if workers else None
        self._ahead: dict[int, Future[T]] = {}
        self._waited = 0.0

    def take(self, step: int) -> T:
        """Returns what step `step` reads, and has the next steps read. Raises what `read` raises for this step."""
        started = time.perf_counter()
        try:
            future = self._ahead.pop(step, None)
            result = self._read(step) if future is None else future.result()
        finally:
            self._waited += time.perf_counter() - started
        if self._pool is not None:
            wanted = range(step + 1, min(step + 1 + self._workers, self._steps))
            for other in self._ahead.keys() - set(wanted):  # the run has gone back to an earlier step
                self._ahead.pop(other).cancel()
            for following in wanted:
                if following not in self._ahead:
                    self._ahead[following] = self._pool.submit(self._read, following)
        return result

    def waited(self) -> float:
        """Returns the seconds that `take` has taken since the last call of this method."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def forget(self) -> None:
        """Forgets what has been read ahead. Call when `read` begins to return other things."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()

    def close(self) -> None:
        self.forget()
        if self._pool is not None:
            self._pool.shutdown(wait=False)
