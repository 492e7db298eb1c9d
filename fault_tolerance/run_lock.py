"""One job for one run directory: `.lock`, held by the launcher, or by rank 0 where there is none. Free of torch.

Of several nodes the one that holds the rendezvous store holds it too: no run is without it, and no run has two. The others only
look whether it is their own job that is in the directory: the file names it.

The kernel gives the lock back when the process ends, however it ends, so nothing is left to clean up. It may not reach processes on
other hosts (a file system without locks); those are kept from committing by the fence (checkpoint/fence.py).
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError

LOCK = ".lock"
_SURE_SECONDS = 1.0
"""A lock that is held for so long is a job's: whoever looks holds it for a moment too, and a holder has told its name by then."""
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def hold(run_dir: Path, job: str = "") -> Iterator[None]:
    """Keep other jobs out of `run_dir`, which is made if need be, for the time of the block.

    `job` names one that runs on several nodes, the same after it was put back into the queue. Its own earlier start is no obstacle:
    the lock of a crashed node may outlive it for a minute on a network file system, and the fence keeps that start from committing.

    Raises RecipeError when another job is in it, or it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RecipeError(f"run.dir={run_dir} cannot be written ({error.strerror}); make it writable or give another") from error
    try:
        _lock(descriptor, run_dir, job)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _about_this_process(job), 0)
        os.fsync(descriptor)  # other nodes read it
        yield
    finally:
        os.close(descriptor)


def refuse_if_held(run_dir: Path, job: str = "") -> None:
    """Raises RecipeError when another job is in `run_dir`; changes nothing."""
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDWR)
    except OSError:
        return  # there is none, or `hold` will say what is wrong
    try:
        _lock(descriptor, run_dir, job)
    finally:
        os.close(descriptor)


def may_be_in_use(run_dir: Path) -> bool:
    """Whether another process holds the lock of `run_dir`, or that cannot be known; changes nothing."""
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        about = _about(descriptor)
        return (about.get("host"), about.get("pid")) != (socket.gethostname(), os.getpid())
    finally:
        os.close(descriptor)


def _lock(descriptor: int, run_dir: Path, job: str) -> None:
    """Lock it, unless another start of `job` has."""
    deadline = time.monotonic() + _SURE_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            about = _about(descriptor)
            if job and about.get("job") == job:
                return None
            if time.monotonic() > deadline:
                raise RecipeError(f"run.dir={run_dir} is in use by {_holder(about)}; wait for it to end, stop it, "
                                  f"or give another run.dir") from error  # fmt: skip
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:
                return None
            raise RecipeError(f"run.dir={run_dir} cannot be locked ({error.strerror}); give another run.dir") from error
        time.sleep(0.05)


def _about_this_process(job: str) -> bytes:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since, "job": job}).encode() + b"\n"


def _about(descriptor: int) -> dict[str, Any]:
    """What the holder of the lock has told of itself."""
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _holder(about: dict[str, Any]) -> str:
    if not {"host", "pid", "since"} <= about.keys():
        return "another job"
    job = f"job {about['job']}, " if about.get("job") else ""
    return f"{job}process {about['pid']} on {about['host']} since {about['since']}"
