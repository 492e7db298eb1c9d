"""Writes files and directories so that they survive a power failure."""

import errno
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Disk:
    """The storage to which this process writes checkpoints. A planned fault can make it behave as if full
    (fault_tolerance/injection)."""

    def __init__(self) -> None:
        self._refused: deque[str] = deque()

    def refuse(self, writes: int, why: str) -> None:
        """Makes the next `writes` calls of `check` fail as on a full disk, with the reason `why`, in addition to those requested
        before."""
        self._refused.extend([why] * writes)

    def check(self) -> None:
        """`write_all` calls this before it writes. Raises OSError if a planned fault makes this write fail."""
        if self._refused:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {self._refused.popleft()}")


DISK = Disk()
"""The only Disk of this process: a full disk affects every writer in it."""


@contextmanager
def durable_file(path: Path) -> Iterator[int]:
    """Creates the file `path`, which must not exist, and yields its descriptor. When the `with` block has ended without an error,
    the data are durable; the file's name is durable only after an fsync of the directory.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes all of `data`, since a single system call may write only a part. Raises OSError."""
    DISK.check()
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def make_directory(path: Path) -> None:
    """Creates the directory `path` and its parents, durably. Raises OSError."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Makes the creation, renaming and removal of names in the directory `path` durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
