"""Provides a folder in memory that the processes of one launch share. It is removed when the launch ends, even by a kill -9.

A separate process removes it. That process starts before the folder exists, and waits until the launcher's end of a pipe closes,
which the kernel does even after a kill -9. If both are killed (a batch system ends a whole job), the folder is left behind without
a holder of its lock, and the next launch on the machine removes it.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

MEMORY = Path("/dev/shm")
_PREFIX = "bagualu-"
_LOCK = "launcher"
_REMOVE = """\
trap '' HUP INT QUIT TERM USR1 USR2
echo
exec >/dev/null
cat >/dev/null
for pause in 0 0.2 0.5 1 2 4; do  # a worker that is about to die may still add a file
    sleep $pause
    rm -rf "$0" "$1"
    [ -e "$0" ] || exit 0
done
"""


@contextlib.contextmanager
def scratch(root: Path | None = None) -> Iterator[Path]:
    """Yields an empty folder below `root`, by default /dev/shm if that is writable, else the temporary directory. Raises
    OSError."""
    root = root or (MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir()))
    _remove_abandoned(root)
    path = root / f"{_PREFIX}{secrets.token_hex(8)}"
    unlocked = path.with_name(f".{path.name}")  # renamed to `path` once it is locked
    remover = subprocess.Popen(
        ["sh", "-c", _REMOVE, path, unlocked], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        cwd="/", start_new_session=True,
    )  # fmt: skip
    assert remover.stdin is not None
    assert remover.stdout is not None
    remover.stdout.readline()  # the remover ignores signals from here on
    remover.stdout.close()
    try:
        lock = _make(unlocked)
        unlocked.rename(path)
        try:
            yield path
        finally:
            os.close(lock)
    finally:
        remover.stdin.close()
        remover.wait()
        shutil.rmtree(path, ignore_errors=True)  # in case the remover was killed


def _make(folder: Path) -> int:
    """Create the folder, accessible to this user only, and return the descriptor of its lock, which is held until it is closed."""
    folder.mkdir(mode=0o700)
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _remove_abandoned(root: Path) -> None:
    """Remove the scratch folders below `root` whose launcher is dead, if they are this user's. A lock that cannot be opened belongs
    to another user."""
    for path in root.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            lock = os.open(path, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
        except BlockingIOError:
            pass  # its launcher is alive
        finally:
            os.close(lock)
