"""Times the file system of run directories: writing a file until it is on the disk, and reading it back."""

import os
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_BLOCK = b"\xa5" * 2**20


@dataclass(frozen=True)
class DiskFigures:
    """What the file system of `path` is capable of."""

    path: str
    write_bytes_per_second: float
    """With an fsync at the end, as a checkpoint has one."""
    read_bytes_per_second: float
    """Of a file that is not in the page cache, if the system can be asked to forget it."""
    sync_seconds: float
    """Time to write a file of 1 MiB, with its fsync."""
    free_bytes: int
    """What a user may still write."""


def disk_figures(path: Path, size: int) -> DiskFigures:
    """Writes and reads `size` bytes in the folder `path` or, if it does not exist, in the nearest folder above it that does. Leaves
    nothing behind. Raises OSError."""
    folder = next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())
    file = folder / f".bagualu-doctor-{secrets.token_hex(4)}"
    try:
        sync = _write(file, 1)
        blocks = max(1, size // len(_BLOCK))
        written = _write(file, blocks)
        read = _read(file)
    finally:
        with suppress(OSError):
            file.unlink()
    size = blocks * len(_BLOCK)
    return DiskFigures(str(folder), size / written, size / read, sync, shutil.disk_usage(folder).free)


def _write(file: Path, blocks: int) -> float:
    """Returns how long it took to write `blocks` blocks, in place of what was there, and to wait until they are on the disk."""
    started = time.perf_counter()
    with file.open("wb", buffering=0) as stream:
        for _ in range(blocks):
            stream.write(_BLOCK)
        os.fsync(stream.fileno())
    return time.perf_counter() - started


def _read(file: Path) -> float:
    """Returns how long it took to read the file, which the system is asked to forget first."""
    with file.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while stream.read(len(_BLOCK)):
            pass
        return time.perf_counter() - started
