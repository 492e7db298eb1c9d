"""What this machine has, as far as it can be seen without measuring: processors, GPUs, memory, versions. Imports no torch."""

import os
import platform
import re
import shutil
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bagualu.launch.workers.scratch import MEMORY
from bagualu.trainer.process.environment import cores
from bagualu.trainer.recipe.choose_backend import gpu_count, torch_has_cuda
from bagualu.trainer.recipe.device_memory import cpu_bytes, gpu_bytes

_PACKAGES = ("bagualu", "torch", "numpy", "hydra-core", "datasets", "tokenizers", "deepspeed", "wandb")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "sve", "bf16")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Facts:
    """This machine and what is installed on it."""

    cpu: str
    cores: int
    """Those that this process may use."""
    instructions: list[str]
    """Those for matrix products that the CPU has."""
    memory_bytes: int
    """Memory that this process and its children may use."""
    gpus: int
    """NVIDIA GPUs that the driver shows."""
    gpu_memory_bytes: int | None
    torch_has_cuda: bool
    shared_memory_bytes: int | None
    """Free memory in /dev/shm; None without it."""
    load: float
    """Processes that ran or waited to run during the last minute."""
    python: str
    system: str
    versions: dict[str, str | None] = field(default_factory=dict)
    """For each package its version; None if it is not installed."""

    def devices(self) -> list[dict[str, Any]]:
        """Returns a description of the CPU and of each GPU."""
        cpu = {
            "type": "cpu",
            "name": self.cpu,
            "cores": self.cores,
            "memory_bytes": self.memory_bytes,
            "instructions": self.instructions,
        }
        return [cpu, *({"type": "cuda", "index": index, "memory_bytes": self.gpu_memory_bytes} for index in range(self.gpus))]


def facts() -> Facts:
    """Looks at this machine."""
    name, flags = _cpu()
    gpus = gpu_count()
    return Facts(
        cpu=name,
        cores=cores(),
        instructions=[one for one in _INSTRUCTIONS if one in flags],
        memory_bytes=cpu_bytes(),
        gpus=gpus,
        gpu_memory_bytes=gpu_bytes(gpus) if gpus else None,
        torch_has_cuda=torch_has_cuda(),
        shared_memory_bytes=shutil.disk_usage(MEMORY).free if MEMORY.is_dir() else None,
        load=os.getloadavg()[0],
        python=platform.python_version(),
        system=platform.platform(),
        versions={package: _version(package) for package in _PACKAGES},
    )


def _cpu() -> tuple[str, set[str]]:
    """Returns the product and the instructions of the CPU, as far as Linux tells."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8")
    except OSError:
        text = ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine(), set(flags[1].split() if flags else ())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
