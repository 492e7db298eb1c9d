"""Lets only one job use a run directory. The file `.lock` is locked by the launcher, or by rank 0 if there is no launcher.

On several nodes, the node with the rendezvous store holds the lock: every run has exactly one such node. The other nodes only check
that the job named in the file is their own.

The kernel releases the lock however the process ends, so nothing is left to clean up. On a network file system, other hosts may not
see the lock; then the fence (checkpoint/saving/fence.py) keeps their processes from committing checkpoints.
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
from bagualu.fault_tolerance.run_directory import RunDirectory

_SURE_SECONDS = 1.0
"""A lock that a process holds for longer is that of a job, not of a check such as `refuse_if_held`, and by then that job has
written about itself into the file."""
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def hold(run_dir: Path, job: str = "") -> Iterator[None]:
    """Locks `run_dir`, so that no other job can use it until the `with` block ends. Creates it if necessary.

    `job` names a job on several nodes; a requeued job has the same name. An earlier start of the same job does not block it,
    because on a network file system the lock of a crashed node may outlive it for a minute, and the fence keeps that start from
    committing.

    Raises RecipeError if another job uses the directory, or if the directory cannot be written or locked. A file system without
    locks is not refused.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(RunDirectory(run_dir).lock, os.O_RDWR | os.O_CREAT, 0o644)
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
    """Raises RecipeError if another job uses `run_dir` (after waiting for up to a second). Changes nothing."""
    try:
        descriptor = os.open(RunDirectory(run_dir).lock, os.O_RDWR)
    except OSError:
        return  # there is no lock file, or `hold` will report the problem
    try:
        _lock(descriptor, run_dir, job)
    finally:
        os.close(descriptor)


def may_be_in_use(run_dir: Path) -> bool:
    """Returns whether another process holds the lock of `run_dir`; True also if that cannot be determined; False if there is no
    lock file. Changes nothing."""
    try:
        descriptor = os.open(RunDirectory(run_dir).lock, os.O_RDWR)
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
    """Takes the lock, unless another start of `job` holds it or the file system has no locks. Raises RecipeError if another job
    still holds it after _SURE_SECONDS."""
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
    """Returns what the process that locks the file last has written about itself; {} if there is nothing valid."""
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
