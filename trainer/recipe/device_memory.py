"""The memory of this machine's devices, read without torch."""

import ctypes
import os
from pathlib import Path

_PROC, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cpu_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Returns the memory that this process and its children may use: the machine's, or less where their control group limits it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits(proc, cgroups)])


def _limits(proc: Path, cgroups: Path) -> list[int]:
    """Returns the limits of the control group of this process and of the groups above it, of version 1 or 2, as far as they can be
    read. In a container, whose groups appear at the root, these are often the root's."""
    try:
        lines = proc.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root, name = (cgroups / "memory", "memory.limit_in_bytes") if controllers else (cgroups, "memory.max")
            own = root / path.lstrip("/")
            for group in (own, *(parent for parent in own.parents if parent.is_relative_to(root))):
                try:
                    limits.append(int((group / name).read_text(encoding="utf-8")))
                except (OSError, ValueError):  # no such group here, or no limit ("max")
                    continue
    return limits


def gpu_bytes(count: int) -> int | None:
    """Returns the memory of the smallest of the first `count` NVIDIA GPUs, from their driver; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if driver.cuInit(0):
        return None
    sizes = []
    for index in range(count):
        device, size = ctypes.c_int(0), ctypes.c_size_t(0)
        if driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device):
            return None
        sizes.append(size.value)
    return min(sizes, default=None)
