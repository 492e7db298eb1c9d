"""C++ sources of operators, compiled against torch's library when a process first needs them.

    CACHE/compiled/NAME-KEY.so      appears by a rename once it is whole
    CACHE/compiled/NAME-KEY.lock    held while compiling; the other processes of the machine wait, then load

CACHE is the default folder of caches. KEY is a hash of the source, the headers beside it, the options and torch's version.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from filelock import FileLock

from bagualu.trainer.user_settings import cpp_compiler, default_cache

_OPTIONS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp")
_TIMEOUT_SECONDS = 120


class CompileError(Exception):
    """A source cannot be compiled or loaded. The message is one line."""


def is_compiled(source: Path, options: Sequence[str]) -> bool:
    """Returns whether the cache has the library of `source`, so that no compiler is needed."""
    return _library(source, options).exists()


def load_compiled(source: Path, options: Sequence[str]) -> ctypes.CDLL:
    """Returns the library of `source`, which is compiled first, with `options`, unless that has been done. Raises CompileError."""
    library = _library(source, options)
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(library.with_suffix(".lock")):
                if not library.exists():
                    _compile(source, options, library)
    except OSError as error:
        raise CompileError(f"{_first_line(str(error))}; give a folder that can be written in XDG_CACHE_HOME") from error
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        library.unlink(missing_ok=True)  # if it is damaged, the next process compiles it again
        raise CompileError(_first_line(str(error))) from error


def _library(source: Path, options: Sequence[str]) -> Path:
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    depends_on = "\0".join((*texts, *_OPTIONS, *options, torch.__version__, *platform.libc_ver()))
    key = hashlib.blake2b(depends_on.encode(), digest_size=12).hexdigest()
    return default_cache() / "compiled" / f"{source.stem}-{key}.so"


def _compile(source: Path, options: Sequence[str], library: Path) -> None:
    """Without -fopenmp when it is linked, so that threads are those of the OpenMP library that torch has loaded, not of another."""
    compiler = cpp_compiler()
    if compiler is None:
        raise CompileError("there is no C++ compiler")
    torchs = files("torch")
    with tempfile.TemporaryDirectory(prefix=f"{library.stem}.tmp-", dir=library.parent) as scratch:
        objects, linked = f"{scratch}/source.o", f"{scratch}/{library.name}"
        _run(compiler, *_OPTIONS, *options, f"-I{torchs / 'include'}", "-c", str(source), "-o", objects)
        _run(compiler, "-shared", objects, f"-L{torchs / 'lib'}", "-ltorch_cpu", "-lc10", "-o", linked)
        os.replace(linked, library)


def _run(*command: str) -> None:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{command[0]} took longer than {_TIMEOUT_SECONDS} seconds") from error
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if "error: " in line] or ended.stderr.splitlines()
        raise CompileError(_first_line("\n".join(lines)) or f"{command[0]} ended with {ended.returncode}")


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
