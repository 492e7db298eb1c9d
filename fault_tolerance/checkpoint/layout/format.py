"""The content of a checkpoint directory, and the classes that describe it.

    step-00000010/
        manifest.json               the table of contents (`Manifest`), encoded by manifest.py
        rank-00000.safetensors      the boxes that rank 0 held, readable by every safetensors library

Every byte is covered by a hash that was taken in memory before the byte was written: the manifest by its own, the header of each
shard by `StoredFile.header_hash`, and each box by a hash per block of `block_bytes`. Blocks let a reader that needs a few rows of a
large tensor read and verify only those. The hashes are xxh3_128: they detect damage but not forgery.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import xxhash

from bagualu.comm.errors import StorageError
from bagualu.parallel.boxes import Box, cover_problem

MANIFEST = "manifest.json"
BLOCK_BYTES = 16 * 2**20
"""Bytes of each hashed block of a box: a multiple of every element size, so that every block begins at an element boundary."""

DTYPES = {
    "float64": ("F64", 8), "int64": ("I64", 8), "float32": ("F32", 4), "int32": ("I32", 4), "float16": ("F16", 2),
    "bfloat16": ("BF16", 2), "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip
"""Maps the name of each torch dtype that can be stored to (safetensors name, bytes per element)."""

REMEDY = "restore it from a copy or use an earlier checkpoint"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message is one line with path, tensor, problem and fix."""


class CheckpointStorageError(CheckpointError, StorageError):
    """The storage of a checkpoint cannot be written or read at the moment, which does not mean that the checkpoint is damaged."""


class SupersededError(CheckpointError):
    """A later start of the run has taken over the run's checkpoints, so this start can no longer save checkpoints."""


@dataclass(frozen=True)
class StoredFile:
    """The size of a shard in bytes, and the size in bytes and the hash of its safetensors header, including the header's 8-byte
    length."""

    bytes: int
    header_bytes: int
    header_hash: str


@dataclass(frozen=True)
class StoredBox:
    """A box of a tensor: its offset and shape in the tensor, the file that holds it, the byte at which it starts in the file, and
    the hash of each of its blocks. Elements are row-major."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    hashes: tuple[str, ...]

    @property
    def box(self) -> Box:
        return Box(self.offset, self.shape)


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor and the boxes that make it up."""

    shape: tuple[int, ...]
    dtype: str
    boxes: Sequence[StoredBox]

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype][1]

    def bytes_of(self, stored: StoredBox) -> int:
        """Returns the size in bytes of a box of this tensor."""
        return prod(stored.shape) * self.item_bytes


@dataclass(frozen=True)
class Manifest:
    """The table of contents of a checkpoint."""

    step: int
    metadata: dict[str, Any]
    block_bytes: int = BLOCK_BYTES
    files: dict[str, StoredFile] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    digest: str = ""
    """Hash of the manifest's content, if the manifest was read from a file; else "". Ranks with equal digests see the same
    checkpoint."""

    @property
    def bytes(self) -> int:
        """The size of all shards together, in bytes."""
        return sum(file.bytes for file in self.files.values())

    def problem(self) -> str | None:
        """Returns a text that names a tensor whose boxes do not cover it exactly once, and says why; None if the boxes of every
        tensor do."""
        for name, tensor in self.tensors.items():
            wrong = cover_problem(tensor.shape, [stored.box for stored in tensor.boxes])
            if wrong:
                return f"tensor {name} is not held exactly once: {wrong}"
        return None


def step_name(step: int) -> str:
    """Returns the directory name for a step, e.g. step-00000010 for step 10."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Returns the step in the name of a committed checkpoint; None for any other name."""
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match and step_name(int(match[1])) == path.name else None


def digest(data: bytes | bytearray) -> str:
    """Returns the hash of `data` that checkpoints use everywhere: xxh3_128 as 32 hexadecimal digits."""
    return str(xxhash.xxh3_128_hexdigest(data))
