"""What a run must not leave behind, wherever and however it ended."""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

_CACHES = ("torchinductor_", "torchelastic_")
"""Of torch: of its compiler, meant to stay; of a torchrun that was killed."""
_SHARED_MEMORY = Path("/dev/shm")
_MARK = "BAGUALU_TEST_MARK"


def hold_mark(environment: Mapping[str, str]) -> int:
    """For a process whose environment, as the kernel shows it, is not the one that it has: it holds the mark open as a file, whose
    number this is."""
    return os.memfd_create(f"{_MARK}={environment[_MARK]}")


class Leftovers:
    """What a run must not leave behind: processes, threads, shared memory, files in the temporary directory.

    Processes are known by a mark, in their environment or held open, so that others on the machine do not matter; nor does
    shared memory whose owner lives.
    """

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self.mark = f"{_MARK}={os.getpid()}-{time.monotonic_ns()}"
        self._threads = set(threading.enumerate())
        self._memory_before = set(_SHARED_MEMORY.glob("bagualu-*/launcher"))

    @property
    def environment(self) -> dict[str, str]:
        """For the processes that a test starts."""
        name, value = self.mark.split("=")
        return {**os.environ, name: value, "TMPDIR": str(self.temporary)}

    def pids(self) -> list[int]:
        """Of the processes that the test has started, and theirs, as far as they are still there."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone meanwhile, or not ours
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0") or self._held_by(folder):
                    found.append(int(folder.name))
        return found

    def _held_by(self, folder: Path) -> bool:
        for file in (folder / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if os.readlink(file).startswith(f"/memfd:{self.mark} "):
                    return True
        return False

    def processes(self) -> list[str]:
        found = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
        return found

    def assert_none(self) -> None:
        """Whatever is on its way out gets a moment."""
        deadline = time.monotonic() + 20
        while (left := self._all()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == [], left

    def _all(self) -> list[str]:
        return [*self.processes(), *self._new_threads(), *self._memory(), *self._files()]

    def _new_threads(self) -> list[str]:
        return ["thread " + thread.name for thread in threading.enumerate() if thread not in self._threads]

    def _files(self) -> list[str]:
        return [str(path) for path in self.temporary.iterdir() if not path.name.startswith(_CACHES)]

    def _memory(self) -> list[str]:
        """Scratch folders that no launcher holds the lock of."""
        found = []
        for path in set(_SHARED_MEMORY.glob("bagualu-*/launcher")) - self._memory_before:
            with contextlib.suppress(FileNotFoundError), path.open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    found.append(str(path.parent))
                except BlockingIOError:
                    continue
        return found
