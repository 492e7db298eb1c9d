"""A look at storage that ends, even where the storage does not answer. Free of torch."""

import threading
from collections.abc import Callable
from typing import TypeVar

from bagualu.comm.errors import StorageError

T = TypeVar("T")


def within(seconds: float, look: Callable[[], T]) -> T:
    """What `look` returns or raises; StorageError when it does neither in time."""
    returned: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(look())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="storage", daemon=True)  # a process that ends does not wait for it
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        raise StorageError(f"has not answered for {seconds:g} s")
    return returned[0]
