"""Output streams that cannot be written, for processes that the tests start. Not collected by pytest."""

import contextlib
import os
from collections.abc import Iterator

KINDS = ("pipe without a reader", "full disk", "closed terminal", "read only")


@contextlib.contextmanager
def broken(kind: str) -> Iterator[int]:
    """A descriptor of which every write fails, for as long as the context lasts."""
    if kind == "pipe without a reader":
        reader, descriptor = os.pipe()
        os.close(reader)
    elif kind == "full disk":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    elif kind == "closed terminal":
        terminal, descriptor = os.openpty()
        os.close(terminal)
    else:
        descriptor = os.open(os.devnull, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
