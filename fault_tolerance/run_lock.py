"""One job for one run directory: `.lock`, held by the launcher, or by rank 0 where there is none. Free of torch.

The kernel gives the lock back when the process ends, however it ends, so nothing is left to clean up. It may not reach processes on
other hosts (a file system without locks); those are kept from committing by the fence (checkpoint/fence.py).
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from bagualu.comm.errors import RecipeError

LOCK = ".lock"
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Keep other jobs out of `run_dir`, which is made if need be, for the time of the block.

    Raises RecipeError when another job is in it, or it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RecipeError(f"run.dir={run_dir} cannot be written ({error.strerror}); make it writable or give another") from error
    try:
        _lock(descriptor, run_dir)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _about_this_process())
        yield
    finally:
        os.close(descriptor)


def refuse_if_held(run_dir: Path) -> None:
    """Raises RecipeError when another job is in `run_dir`; changes nothing."""
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDWR)
    except OSError:
        return  # there is none, or `hold` will say what is wrong
    try:
        _lock(descriptor, run_dir)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, run_dir: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RecipeError(f"run.dir={run_dir} is in use by {_holder(descriptor)}; wait for it to end, stop it, "
                          f"or give another run.dir") from error  # fmt: skip
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise RecipeError(f"run.dir={run_dir} cannot be locked ({error.strerror}); give another run.dir") from error


def _about_this_process() -> bytes:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode() + b"\n"


def _holder(descriptor: int) -> str:
    """Who holds the lock, as far as it has told."""
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "another job"
