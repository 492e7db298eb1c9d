"""What a user has set in the environment for all runs. Does not import torch."""

import os
import shutil
from pathlib import Path


def default_cache() -> Path:
    """Returns $XDG_CACHE_HOME/bagualu or, if the variable is not set, ~/.cache/bagualu. It is the user's setting for all caches."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bagualu"


def kernels_folder() -> Path:
    """Returns the folder for generated kernels, which torch's variable TORCHINDUCTOR_CACHE_DIR names."""
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(named) if named else default_cache() / "kernels"


def kernel_settings() -> list[tuple[str, str]]:
    """Returns the settings of torch's compiler in the environment, by name: TORCHINDUCTOR_*, but for the folder."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("TORCHINDUCTOR_")}
    return sorted((name, value) for name, value in ours.items() if name != "TORCHINDUCTOR_CACHE_DIR")


def cpp_compiler() -> str | None:
    """Returns the path of the C++ compiler for kernels: g++ or, as for torch's compiler, the one that the variable CXX
    names; None if there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")
