"""The environment that every contestant runs in, the same for all, and what this machine is. Free of torch."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ALLOCATORS = {
    # Keep freed memory (giving it back costs page faults in the next step) and ask for 2 MB pages.
    "tuned": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=17179869184"
                                ":glibc.malloc.mmap_threshold=4294967296:glibc.malloc.top_pad=67108864"},
    "system": {},
}  # fmt: skip
PACKAGES = ("torch", "numpy", "deepspeed", "bagualu")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


def environment(threads: int, allocator: str) -> dict[str, str]:
    """Variables of one contestant process with `threads` threads; `allocator` is a key of ALLOCATORS."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "LD_PRELOAD")}
    return inherited | ALLOCATORS[allocator] | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def cores_of(process: int, processes: int, threads: int) -> list[int]:
    """Cores that one of `processes` is pinned to: neighbours, and nobody else's."""
    available = sorted(os.sched_getaffinity(0))
    if processes * threads > len(available):
        needed = f"@{processes}x{threads} needs {processes * threads} cores"
        raise ValueError(f"{needed} but this machine has {len(available)}; ask for fewer")
    return available[process * threads : (process + 1) * threads]


def machine(device: str = "cpu") -> dict[str, Any]:
    """The GPU if that is the device; CPU model, cores, the instructions for bfloat16, memory and the load when asked."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", "").split()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip() if device == "cuda" else None
    return {
        "gpu": gpu,
        "cpu": fields.get("model name", platform.processor()),
        "model": f"{fields.get('cpu family', '?')}-{fields.get('model', '?')}",
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": list(os.getloadavg()),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
