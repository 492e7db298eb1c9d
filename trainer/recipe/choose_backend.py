"""Chooses the backend for `comm.backend=auto` on this machine.

The choice comes before everything that depends on the backend: the checks of the recipe, config.yaml, the workers.
"""

import ctypes
import re
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from bagualu.comm.config import AUTO
from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.trainer.recipe.compose import load_recipe
from bagualu.trainer.recipe.config import Recipe


@dataclass(frozen=True)
class Choice:
    """A backend, and the reason why it was chosen; "" if the recipe itself names it."""

    backend: str
    why: str = ""

    def __str__(self) -> str:
        return f"comm.backend={self.backend}" + (f" ({self.why})" if self.why else "")


def choose_backend(recipe: Recipe, workers: int) -> tuple[Recipe, Choice]:
    """Returns the recipe with `auto` replaced by a backend, for `workers` workers on this machine, and the choice.

    `auto` becomes nccl if each worker has a GPU, else gloo; but a run that resumes keeps the backend with which it began.
    """
    if recipe.comm.backend != AUTO:
        return recipe, Choice(recipe.comm.backend)
    gpus, why = _usable_gpus(workers)
    choice = _as_begun(recipe, gpus, workers) or Choice("nccl" if gpus >= workers else "gloo", why)
    return replace(recipe, comm=replace(recipe.comm, backend=choice.backend)), choice


def _as_begun(recipe: Recipe, gpus: int, workers: int) -> Choice | None:
    """Returns the backend with which the run began, if it resumes and this machine supports that backend (gloo for every run that
    began on CPUs); else None."""
    directory = Path(recipe.run.dir)
    try:
        if not (recipe.checkpoint.resume and RunDirectory(directory).has_begun()):
            return None
        before = load_recipe(RunDirectory(directory).config).comm
    except (OSError, RecipeError):  # the later check of the run directory reports it
        return None
    has_gpus = gpus >= workers
    if before.on_cpu:  # includes `simulated`, whose ranks are threads
        return Choice("gloo", "on CPUs, as the run began" + ("; comm.backend=nccl takes the GPUs" if has_gpus else ""))
    known = before.backend not in (AUTO, "simulated") and before.backend in registered()
    return Choice(before.backend, "as the run began") if known and (has_gpus or before.backend != "nccl") else None


def _usable_gpus(workers: int) -> tuple[int, str]:
    """Returns the number of GPUs that torch can use on this machine, and as text whether they suffice for `workers` workers."""
    gpus = gpu_count()
    if not gpus:
        return 0, "no NVIDIA GPU here"
    if not torch_has_cuda():
        return 0, "the installed torch is built without CUDA, so the GPUs here are not used"
    if gpus < workers:
        return gpus, f"{gpus} GPU{'s' * (gpus > 1)} here for {workers} workers"
    return gpus, "a GPU for each worker"


def registered() -> list[str]:
    """Returns the values that `comm.backend` may have besides `auto`, including those of installed plug-ins."""
    return sorted(entry.name for entry in entry_points(group="bagualu.backends"))


def gpu_count() -> int:
    """Returns the number of NVIDIA GPUs that this process may use, 0 without a driver. It asks the driver, which is faster than
    importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def torch_has_cuda() -> bool:
    """Returns whether the installed torch was built for NVIDIA GPUs, according to its version.py; True if that file does not
    tell."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return True  # if it was not, NCCL reports that itself
    cuda = re.search(r"^cuda\b[^=]*=\s*(.+)$", text, re.MULTILINE)
    return cuda is None or cuda[1].strip() != "None"
