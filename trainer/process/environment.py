"""What a worker process needs from the machine before it starts: CPU threads, cores of its own, an allocator that fits.

The C library reads its settings once, when a process begins, and OpenMP when torch is imported. So they are put into the
environment first and the process started after: by the launcher for its workers, by `python -m bagualu.trainer` for itself.
Free of torch. docs/design/launch.md has the measurements behind the allocator's numbers.
"""

import os
import sys
from pathlib import Path

from bagualu.trainer.recipe.config import LaunchConfig

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Ask for transparent 2 MB pages (madvise): 512 times fewer page faults and entries in the TLB."""
KEEP_FREED = (
    "glibc.malloc.mmap_threshold=4294967296",  # bytes; below this a tensor comes from the heap, not from a fresh mapping
    "glibc.malloc.trim_threshold=17179869184",  # bytes of free heap that are kept rather than given back
    "glibc.malloc.top_pad=67108864",  # bytes by which the heap grows at a time
)
CUBLAS, REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""The workspaces with which NVIDIA's matrix products are the same every time (cuBLAS, "Results Reproducibility")."""
LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
"""Torch's C++ code warns of every connection that is lost, with a stack of its own functions; what was lost, we say in one line."""
QUOTA = Path("/sys/fs/cgroup/cpu.max")
TRAIN = "bagualu.trainer.run:train"
"""What a worker runs, as "module:function": (recipe, communicator, stop, scratch) -> summary."""


def cores() -> int:
    """How many cores this process may keep busy: those it may run on, no more of them than a container's CPU quota allows."""
    return min(len(_allowed()), _quota() or sys.maxsize)


def _allowed() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _quota() -> int | None:
    """Of this container, in cores; None: it has none."""
    try:
        quota, period = QUOTA.read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None


def threads(config: LaunchConfig, workers: int) -> int:
    """CPU threads of each of `workers` processes on this machine."""
    return config.threads or max(1, cores() // workers)


def variables(config: LaunchConfig, workers: int) -> dict[str, str]:
    """Environment variables to start each of `workers` processes with; what a person has set stays where it serves."""
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


def pin(config: LaunchConfig, local_rank: int, workers: int) -> None:
    """Keep this process on its share of the cores. With more workers than cores the kernel shares them out better, and under a
    quota too: it says how much may be used, not where, and other containers would choose the same cores."""
    usable = _allowed()
    share = len(usable) // workers
    if config.affinity and share and cores() == len(usable) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, usable[local_rank * share : (local_rank + 1) * share])
