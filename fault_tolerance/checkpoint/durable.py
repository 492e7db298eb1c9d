"""Files and directories that are there after a power cut as well. Free of torch."""

import errno
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Disk:
    """The storage that this process writes checkpoints to. A planned fault can fill it (fault_tolerance/injection)."""

    def __init__(self) -> None:
        self._refused: deque[str] = deque()

    def refuse(self, writes: int, why: str) -> None:
        """The next `writes` writes find no space, and say `why`."""
        self._refused.extend([why] * writes)

    def check(self) -> None:
        """Before every write. Raises OSError."""
        if self._refused:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {self._refused.popleft()}")


DISK = Disk()
"""One for the process, as a full disk is full for all of it."""


@contextmanager
def durable_file(path: Path) -> Iterator[int]:
    """Descriptor of the new file `path`. Its data is durable after the block, its name once the directory is too.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`: one call may take only a part of it. Raises OSError."""
    DISK.check()
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def make_directory(path: Path) -> None:
    """Create the directory `path` and its parents. Raises OSError."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the names in `path` durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
