"""Limits the time of an operation on storage that may not respond."""

import threading
from collections.abc import Callable
from typing import TypeVar

from bagualu.comm.errors import StorageError

T = TypeVar("T")


def within(seconds: float, look: Callable[[], T]) -> T:
    """Calls `look` in a thread and returns its result or raises its error. If `look` does not end within `seconds`, raises
    StorageError and leaves the thread running."""
    returned: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(look())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="storage", daemon=True)  # a daemon thread does not keep the process from ending
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        raise StorageError(f"has not answered for {seconds:g} s")
    return returned[0]
