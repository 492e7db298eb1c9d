"""Code that torch's compiler has generated, kept so that later processes run it without the compiler.

    FOLDER/code-KEY/call.py          the generated Python module, which calls the kernels
    FOLDER/code-KEY/0.so, 1.so ...   the libraries of the kernels, in the order in which it loads them
    FOLDER/code-KEY.lock             held while compiling; the other processes of the machine wait, then load

KEY is a hash of what the code depends on. Code is kept for CPUs only: that for a GPU needs the compiler's modules to run.
"""

import builtins
import hashlib
import itertools
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from filelock import FileLock

from bagualu.trainer.user_settings import kernel_settings, kernels_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Code:
    """Code that computes a function."""

    call: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
    """Takes the tensors among the arguments in a list, which it empties, and returns the results."""
    returns_one: bool
    """Whether the function returns a tensor, not a tuple of tensors."""

    def on_arguments(self, given: Sequence[Any]) -> Any:
        """Returns the results for all arguments; numbers are part of the code."""
        results = self.call([value for value in given if isinstance(value, torch.Tensor)])
        return results[0] if self.returns_one else tuple(results)


@dataclass(frozen=True)
class Generated:
    """Code, and the files that later processes need to run it."""

    code: Code
    module: str | None
    """The text of the Python module that has the function `call`; None if it needs more than the libraries, as on a GPU."""
    libraries: list[Path]
    """The libraries of the kernels in C++, in the order in which the module loads them."""


FORMAT = 1
"""A number in KEY. Raise it when what is kept, or how code is generated (inductor.py), changes."""
_ADDRESS = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"
"""The environment variable in which a library of kernels expects the address of torch's function that returns a tensor's memory."""


def load_or_make(depends_on: tuple[Any, ...], make: Callable[[], Generated]) -> Code:
    """Returns the code that is kept for what it `depends_on`, besides torch, the settings of its compiler, Python and the CPU; if
    there is none, keeps what `make` returns, unless it cannot be kept. Raises what `make` raises."""
    versions = torch.__version__, platform.python_version()
    everything = repr((FORMAT, depends_on, versions, torch.backends.cpu.get_cpu_capability(), _cpu(), kernel_settings()))
    folder = kernels_folder() / f"code-{hashlib.blake2b(everything.encode(), digest_size=16).hexdigest()}"
    if (code := _load(folder)) is not None:
        return code
    with _locked(folder):
        return _load(folder) or _keep(folder, make())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, unless nothing can be written there, and so nothing is kept."""
    lock = FileLock(f"{folder}.lock")
    with suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _keep(folder: Path, generated: Generated) -> Code:
    if generated.module is None:
        return generated.code
    try:
        shutil.rmtree(folder, ignore_errors=True)  # if it is damaged
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=folder.parent) as scratch:
            (whole := Path(scratch, "whole")).mkdir()
            (whole / "call.py").write_text(f"{generated.module}\nreturns_one = {generated.code.returns_one}\n", encoding="utf-8")
            for number, library in enumerate(generated.libraries):
                shutil.copyfile(library, whole / f"{number}.so")
            whole.rename(folder)
    except OSError as error:
        log.warning("cannot keep generated kernels in %s (%s); give data.cache=FOLDER with room to write", folder.parent, error)
    return _load(folder) or generated.code


def _load(folder: Path) -> Code | None:
    """Returns the code in `folder`; None if there is none, or it is damaged."""
    try:
        text = (folder / "call.py").read_text(encoding="utf-8")
        variables: dict[str, Any] = {"__name__": folder.name, "__builtins__": {**vars(builtins), "__import__": _Imports(folder)}}
        exec(compile(text, str(folder / "call.py"), "exec"), variables)
    except FileNotFoundError:
        return None
    except Exception as error:
        log.debug("generated kernels in %s cannot be loaded: %s", folder, error)
        return None
    return Code(variables["call"], variables["returns_one"])


class _Imports:
    """Imports for a generated module, with stand-ins for what it imports of the compiler: of that it uses `cpp_pybinding` alone,
    which would compile a kernel and load its library."""

    def __init__(self, folder: Path) -> None:
        self._libraries = (folder / f"{number}.so" for number in itertools.count())
        self._compiler = SimpleNamespace(
            AsyncCompile=lambda: SimpleNamespace(cpp_pybinding=self._next_kernel, wait=lambda names: None),
            run_intermediate_hooks=None, maybe_profile=None, _align=None, extern_kernels=None,
        )  # fmt: skip

    def __call__(self, name: str, *given: Any) -> Any:
        return self._compiler if name.startswith("torch._inductor") else builtins.__import__(name, *given)

    def _next_kernel(self, *source: Any) -> Any:
        path = next(self._libraries)
        os.environ[_ADDRESS] = str(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)  # type: ignore[attr-defined]
        loader = ExtensionFileLoader(f"{path.parent.name}-{path.stem}.kernel", str(path))
        spec = spec_from_loader(loader.name, loader)
        assert spec is not None
        loader.exec_module(module := module_from_spec(spec))
        return module.kernel


@cache
def _cpu() -> list[str]:
    """Returns the product and the instructions of the CPU, as far as Linux tells: kernels are made for exactly this one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return [platform.processor(), platform.machine()]
    return [next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags", "Features")]
