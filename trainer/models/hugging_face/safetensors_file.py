"""Reads boxes of tensors from safetensors files by plain reads, without mapping the file: a file that is cut off or a disk that
fails is an error, not a signal that ends the process. It does not import torch."""

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from bagualu.comm.errors import RecipeError

DTYPES = {"F64": ("float64", 8), "F32": ("float32", 4), "BF16": ("bfloat16", 2), "F16": ("float16", 2)}
"""Maps the dtypes of weights in safetensors files to (name in torch, bytes per element)."""
_LONGEST_HEADER = 10**8
"""The longest header that the format allows, in bytes."""
_FIX = "download or copy it again"
_SHOWN = 80
"""The most characters of a wrong value that a message shows."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file."""

    path: Path
    kind: str
    """The dtype, by its name in the file."""
    shape: tuple[int, ...]
    start: int
    """The byte of the file at which it begins."""

    @property
    def dtype(self) -> str:
        return DTYPES[self.kind][0]

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.kind][1]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.item_bytes


def read_header(path: Path) -> dict[str, FileTensor]:
    """Returns the tensors of the file, by name. Raises RecipeError if the file cannot be read, is cut off, or is not as the format
    says."""
    try:
        with path.open("rb") as file:
            size, first = os.fstat(file.fileno()).st_size, file.read(8)
            length = int.from_bytes(first, "little")
            whole = len(first) == 8 and length <= min(size - 8, _LONGEST_HEADER)
            header = json.loads(file.read(length)) if whole else None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}); {_FIX}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} has no header of a safetensors file ({error}); {_FIX}") from error
    if not whole:
        raise RecipeError(f"{path} is cut off within its header, at {size} bytes; {_FIX}")
    if not isinstance(header, dict):
        raise RecipeError(f"{path} has no header of a safetensors file, but {_short(header)}; {_FIX}")
    entries = {name: about for name, about in header.items() if name != "__metadata__"}
    return {name: _tensor(path, name, about, 8 + length, size) for name, about in entries.items()}


def _tensor(path: Path, name: str, about: Any, data: int, size: int) -> FileTensor:
    """Returns the tensor that an entry of the header describes. `data`: the byte at which the tensors begin; `size`: that of the
    file. Raises RecipeError."""
    fields = about if isinstance(about, dict) else {}
    kind, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or not _are_counts(shape) or not _are_counts(place) or len(place) != 2:
        raise RecipeError(f"{path}: tensor {name} has no dtype, shape and place, but {_short(about)}; {_FIX}")
    begin, end = place
    if data + end > size:
        raise RecipeError(f"{path} is cut off: it has {size} bytes, but tensor {name} ends at byte {data + end}; {_FIX}")
    if begin > end or (kind in DTYPES and end - begin != prod(shape) * DTYPES[kind][1]):
        raise RecipeError(f"{path}: tensor {name} of {kind} {shape} lies at bytes {begin} to {end} of the data; {_FIX}")
    return FileTensor(path, kind, tuple(shape), data + begin)


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def read_bytes(descriptor: int, path: Path, at: int, into: memoryview) -> None:
    """Fills `into` with the bytes of the file from byte `at` on. `path`: the file's, for messages. Raises RecipeError."""
    filled = 0
    while filled < len(into):
        try:
            count = os.preadv(descriptor, [into[filled:]], at + filled)
        except OSError as error:
            raise RecipeError(f"{path} cannot be read ({error.strerror}); {_FIX}") from error
        if not count:
            raise RecipeError(f"{path} ends at byte {at + filled}, within a tensor; {_FIX}")
        filled += count
