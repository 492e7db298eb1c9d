"""What a checkpoint is made of. Free of torch, so that it can be listed and verified without it.

    step-00000010/
        manifest.json               the table of contents, see `Manifest`; what its bytes are is in manifest.py
        rank-00000.safetensors      the boxes rank 0 held; readable by any safetensors reader, and never executed

Every byte is under a hash taken in memory before it was written: the manifest by its own, the header of each shard by
`StoredFile.header_hash`, each box by one hash for every `block_bytes` of it. Blocks let a reader that needs a few rows
of a large tensor read and verify only those. Hashes are xxh3_128: they find damage, they do not stop a forger.
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
"""A multiple of every item size, so that a block begins with a whole element."""

DTYPES = {
    "float64": ("F64", 8), "int64": ("I64", 8), "float32": ("F32", 4), "int32": ("I32", 4), "float16": ("F16", 2),
    "bfloat16": ("BF16", 2), "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip
"""Dtype in torch -> its name in safetensors, bytes of one element."""

REMEDY = "restore it from a copy or use an earlier checkpoint"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read. One line: where, which tensor, what is wrong, what to do."""


class CheckpointStorageError(CheckpointError, StorageError):
    """The storage of a checkpoint cannot be written or read now."""


class SupersededError(CheckpointError):
    """A later start of the run has its checkpoints: this one saves nothing any more."""


@dataclass(frozen=True)
class StoredFile:
    """A shard: its size, and how many bytes its safetensors header (length word included) takes."""

    bytes: int
    header_bytes: int
    header_hash: str


@dataclass(frozen=True)
class StoredBox:
    """One box of a tensor: where it lies in the tensor, and at which byte of which file it begins, row-major."""

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
        """Bytes that one of its boxes takes."""
        return prod(stored.shape) * self.item_bytes


@dataclass(frozen=True)
class Manifest:
    """The table of contents."""

    step: int
    metadata: dict[str, Any]
    block_bytes: int = BLOCK_BYTES
    files: dict[str, StoredFile] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    digest: str = ""
    """Hash of all the rest, of a manifest that was read; two ranks with the same one see the same checkpoint."""

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(file.bytes for file in self.files.values())

    def problem(self) -> str | None:
        """Why the boxes do not make up the tensors, naming the first tensor they do not; None when they do."""
        for name, tensor in self.tensors.items():
            wrong = cover_problem(tensor.shape, [stored.box for stored in tensor.boxes])
            if wrong:
                return f"tensor {name} is not held exactly once: {wrong}"
        return None


def step_name(step: int) -> str:
    """step-00000010 for step 10."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a committed checkpoint by its name; None for any other name."""
    found = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(found[1]) if found and step_name(int(found[1])) == path.name else None


def digest(data: bytes | bytearray) -> str:
    """The hash used everywhere in a checkpoint: xxh3_128 in 32 hexadecimal digits."""
    return str(xxhash.xxh3_128_hexdigest(data))
