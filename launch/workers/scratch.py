"""A folder in memory that the processes of one launch share, and that is gone when the launch is over, however it ends.

Its remover is a process of its own, there before the folder is, that waits for the launcher's end of a pipe to close: the
kernel closes it after a kill -9 too. What kills the remover along with the launcher (a batch system that ends a whole job)
leaves the folder behind; nobody holds its lock then, and the next launch on the machine removes it.
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
    """An empty folder below `root` (None: memory where there is some, else the temporary directory). Raises OSError."""
    root = root or (MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir()))
    _remove_abandoned(root)
    path = root / f"{_PREFIX}{secrets.token_hex(8)}"
    unlocked = path.with_name(f".{path.name}")  # a folder gets its name once it is locked
    remover = subprocess.Popen(
        ["sh", "-c", _REMOVE, path, unlocked], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        cwd="/", start_new_session=True,
    )  # fmt: skip
    assert remover.stdin is not None
    assert remover.stdout is not None
    remover.stdout.readline()  # from here on no signal ends it
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
        shutil.rmtree(path, ignore_errors=True)  # should the remover have been killed


def _make(folder: Path) -> int:
    """Make the folder, readable by this user alone; the descriptor of its lock, held until it is closed."""
    folder.mkdir(mode=0o700)
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _remove_abandoned(root: Path) -> None:
    """Remove this user's folders whose launcher is dead. What cannot be looked into is somebody else's."""
    for path in root.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            lock = os.open(path, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
        except BlockingIOError:
            pass  # its launcher lives
        finally:
            os.close(lock)
