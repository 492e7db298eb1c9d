"""Reads boxes of tensors from safetensors files by plain reads, without mapping the file: a file that is cut off or a disk that
fails is an error, not a signal that ends the process. It does not import torch."""

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.parallel.boxes import Box

DTYPES = {"F64": ("float64", 8), "F32": ("float32", 4), "BF16": ("bfloat16", 2), "F16": ("float16", 2)}
"""Maps the dtypes of weights in safetensors files to (name in torch, bytes per element)."""
_LONGEST_HEADER = 10**8
"""The longest header that the format allows, in bytes."""
_FIX = "download or copy it again"


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


def read_header(path: Path) -> dict[str, FileTensor]:
    """Returns the tensors of the file, by name. Raises RecipeError if the file cannot be read, is cut off, or is not as the format
    says."""
    try:
        with path.open("rb") as file:
            size, first = os.fstat(file.fileno()).st_size, file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise RecipeError(f"{path} is cut off within its header, at {size} bytes; {_FIX}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}); {_FIX}") from error
    except ValueError as error:
        raise RecipeError(f"{path} has no header of a safetensors file ({error}); {_FIX}") from error
    entries = {name: about for name, about in header.items() if name != "__metadata__"}
    return {name: _tensor(path, name, about, 8 + length, size) for name, about in entries.items()}


def _tensor(path: Path, name: str, about: Any, data: int, size: int) -> FileTensor:
    try:
        kind, shape, (begin, end) = about["dtype"], tuple(map(int, about["shape"])), about["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise RecipeError(f"{path}: tensor {name} has no dtype, shape and place ({error}); {_FIX}") from error
    if data + end > size:
        raise RecipeError(f"{path} is cut off: it has {size} bytes, but tensor {name} ends at byte {data + end}; {_FIX}")
    if kind in DTYPES and end - begin != prod(shape) * DTYPES[kind][1]:
        raise RecipeError(f"{path}: tensor {name} of {kind} {list(shape)} has {end - begin} bytes; {_FIX}")
    return FileTensor(path, kind, shape, data + begin)


def read_rows(descriptor: int, tensor: FileTensor, box: Box, into: memoryview) -> None:
    """Fills `into` with the bytes of whole rows: `box` has the full extent of every dim but the first. Raises RecipeError."""
    row = prod(tensor.shape[1:]) * tensor.item_bytes
    at, filled = tensor.start + (box.offset[0] * row if box.offset else 0), 0
    while filled < len(into):
        try:
            count = os.preadv(descriptor, [into[filled:]], at + filled)
        except OSError as error:
            raise RecipeError(f"{tensor.path} cannot be read ({error.strerror}); {_FIX}") from error
        if not count:
            raise RecipeError(f"{tensor.path} ends at byte {at + filled}, within a tensor; {_FIX}")
        filled += count
