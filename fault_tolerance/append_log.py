"""A file to which lines are appended. If the disk is full, lines are written later or, at worst, the oldest unwritten lines are
lost; the run goes on."""

import contextlib
import logging
import os
from collections import deque
from pathlib import Path

from bagualu.fault_tolerance.files import write_atomic

_MOST_WAITING = 10_000
"""How many unwritten lines are kept in memory; beyond this number the oldest of them are dropped."""
log = logging.getLogger(__name__)


class AppendLog:
    """Appends each line to `path` immediately, normally in a single write.

    Lines that cannot be written are kept in memory and retried on the next `add` or `write`. The first failure logs a warning;
    later failures log none until a write has succeeded in between.

    `shared` says that other processes append too. If a write fails in the middle of a line, its first part then stays in the file
    and the next line starts after a line break; if not `shared`, that part is removed. With `durable`, each call that writes lines
    ends with an fsync.
    """

    def __init__(self, path: Path, shared: bool = False, durable: bool = False) -> None:
        self.path, self._shared, self._durable = path, shared, durable
        self._waiting: deque[bytes] = deque(maxlen=_MOST_WAITING)
        self._descriptor: int | None = None
        self._warned = False

    def add(self, line: str) -> bool:
        """Append `line`, given without a line break. Returns whether this line and all lines added before it are now in the
        file."""
        self._waiting.append(line.encode() + b"\n")
        return self.write()

    def write(self) -> bool:
        """Tries to write the lines that are still unwritten. Returns whether none is left."""
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
                log.warning("%s cannot be written (%s); its lines are kept in memory, make room", self.path, error.strerror)
            self._warned = True
            return False
        self._warned = False
        return True

    def drop(self) -> None:
        """Discards the unwritten lines, which are then never written."""
        self._waiting.clear()

    def truncate(self, size: int) -> None:
        """Truncate the file to its first `size` bytes, and discard the unwritten lines. Raises OSError if that fails."""
        self.drop()
        os.ftruncate(self._open(), size)

    def replace(self, data: bytes) -> None:
        """Atomically replace the file's content with `data`, and discard the unwritten lines.

        If `data` cannot be written, the file stays as it is and a warning is logged.
        """
        self.drop()
        try:
            write_atomic(self.path, data)
        except OSError as error:
            log.warning("%s stays as it is, with lines that are out of date (%s); make room", self.path, error.strerror)
            return
        self.close()  # the descriptor still refers to the old file

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
        """Append `line`, normally by a single write, so that lines of several processes do not mix. Raises OSError if the line
        cannot be written completely."""
        descriptor = self._open()
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # the last line was cut short
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
