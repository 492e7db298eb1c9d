"""A file that gets lines at its end. A disk that is full costs lines at worst, never the run. Free of torch."""

import contextlib
import logging
import os
from collections import deque
from pathlib import Path

from bagualu.fault_tolerance.files import write_atomic

_MOST_WAITING = 10_000
"""Lines; of more, the oldest are dropped."""
log = logging.getLogger(__name__)


class AppendLog:
    """Appends to `path`, each line in the file as soon as it is added. What cannot be written waits, and is tried again with the
    next line, or `write`; of that one warning is given.

    `shared`: other processes append too. Then a line that was cut short stays, as a line of its own; else it is taken back.
    `durable`: on the disk, not only in the file.
    """

    def __init__(self, path: Path, shared: bool = False, durable: bool = False) -> None:
        self.path, self._shared, self._durable = path, shared, durable
        self._waiting: deque[bytes] = deque(maxlen=_MOST_WAITING)
        self._descriptor: int | None = None
        self._warned = False

    def add(self, line: str) -> bool:
        """Append `line`, which has no end of line; whether it, and all before it, are written."""
        self._waiting.append(line.encode() + b"\n")
        return self.write()

    def write(self) -> bool:
        """Write what waits; whether nothing does any more."""
        if not self._waiting:
            return True
        try:
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting.popleft()
            if self._durable:
                os.fsync(self._open())
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s); its lines wait, make room", self.path, error.strerror)
            self._warned = True
            return False
        self._warned = False
        return True

    def drop(self) -> None:
        """Forget what waits."""
        self._waiting.clear()

    def truncate(self, size: int) -> None:
        """Keep the first `size` bytes, and nothing that waits. Raises OSError."""
        self.drop()
        os.ftruncate(self._open(), size)

    def replace(self, data: bytes) -> None:
        """Make `data` the whole file, in one moment, and forget what waits.

        Where that finds no room the file stays as it is, with a warning. Raises OSError where it cannot be read or opened.
        """
        self.drop()
        try:
            write_atomic(self.path, data)
        except OSError as error:
            log.warning("%s stays as it is, with lines that no longer count (%s); make room", self.path, error.strerror)
            return
        self.close()  # the descriptor is that of the file before

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        return self._descriptor

    def _append(self, line: bytes) -> None:
        """One write, as a rule, so that lines of several processes do not mix. Raises OSError."""
        descriptor = self._open()
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # somebody's line was cut short
            line = b"\n" + line
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            if not self._shared:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
            raise
