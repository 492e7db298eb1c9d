"""Computes the environment in which a worker process should start: its CPU threads, its cores and the settings of its allocator.

The C library reads its settings only when a process starts, and OpenMP when torch is imported. So they are set in the environment
before the process starts: by the launcher for its workers, by `python -m bagualu.trainer` for itself, which then restarts.
docs/design/launch.md has the measurements behind the allocator's numbers.
"""

import os
import sys
from pathlib import Path

from bagualu.trainer.recipe.config import LaunchConfig

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Makes malloc ask for transparent 2 MB pages (madvise), which take 512 times fewer page faults and TLB entries."""
KEEP_FREED = (
    "glibc.malloc.mmap_threshold=4294967296",  # bytes; below this a tensor comes from the heap, not from a fresh mapping
    "glibc.malloc.trim_threshold=17179869184",  # bytes of free heap that are kept rather than given back
    "glibc.malloc.top_pad=67108864",  # bytes by which the heap grows at a time
)
CUBLAS, REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""An environment variable, and those of its values (workspace sizes) with which cuBLAS returns the same bits every time (its
documentation, "Results Reproducibility")."""
KERNELS = "TORCHINDUCTOR_CACHE_DIR"
"""The environment variable with the folder in which torch keeps the kernels that it generates."""
LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
"""The environment variable with the lowest severity that torch's C++ code logs. Workers get ERROR, because torch warns of every
lost connection with a stack trace, and a line of ours reports the loss."""
QUOTA = Path("/sys/fs/cgroup/cpu.max")
TRAIN = "bagualu.trainer.run:train"
"""The function that a worker runs, as "module:function": (recipe, communicator, stop, scratch) -> summary."""


def cores() -> int:
    """Returns how many cores this process may use: those of its CPU affinity, but at most the container's CPU quota."""
    return min(len(_allowed()), _quota() or sys.maxsize)


def _allowed() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _quota() -> int | None:
    """Returns the CPU quota of this container in cores, rounded down but at least 1; None if there is no quota or it cannot be
    read (it is read from cgroup v2)."""
    try:
        quota, period = QUOTA.read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None


def threads(config: LaunchConfig, workers: int) -> int:
    """Returns the number of CPU threads for each of `workers` processes on this machine: launch.threads or, if that is left out, an
    even share of `cores`, at least 1."""
    return config.threads or max(1, cores() // workers)


def variables(config: LaunchConfig, workers: int) -> dict[str, str]:
    """Returns the environment variables with which to start each of `workers` processes, to be added to the present ones. The
    user's log level, repeatable cuBLAS workspace and malloc settings are kept, the numbers of threads are replaced."""
    count = str(threads(config, workers))
    wanted = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    if LOG_LEVEL not in os.environ:
        wanted[LOG_LEVEL] = "ERROR"
    if os.environ.get(CUBLAS) not in REPEATABLE:
        wanted[CUBLAS] = REPEATABLE[0]
    if config.allocator == "tuned":
        given = os.environ.get("GLIBC_TUNABLES", "")
        named = {entry.split("=")[0] for entry in given.split(":")}
        added = [entry for entry in (HUGE_PAGES, *KEEP_FREED) if entry.split("=")[0] not in named]
        wanted["GLIBC_TUNABLES"] = ":".join([*filter(None, [given]), *added])
    return wanted


def keep_kernels_in(folder: Path) -> None:
    """Makes torch keep generated kernels in `folder`, unless the user has named another. Its own default is a folder in /tmp, which
    no run on another day or node finds."""
    os.environ.setdefault(KERNELS, str(folder))


def pin(config: LaunchConfig, local_rank: int, workers: int) -> None:
    """Pins this process to an equal part of the cores that this machine's `workers` processes may use, if launch.affinity=true.

    With more workers than cores it does nothing, because the kernel then distributes them better. Under a CPU quota it does nothing
    either: a quota limits how much is used, not which cores, and other containers would be pinned to the same cores."""
    usable = _allowed()
    share = len(usable) // workers
    if config.affinity and share and cores() == len(usable) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, usable[local_rank * share : (local_rank + 1) * share])
