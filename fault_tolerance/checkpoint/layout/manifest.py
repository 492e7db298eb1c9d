"""Encodes and decodes manifest.json. Its first line says where in the file the table of each tensor is.

    {"hash":"..","content":{"format":..,"step":..,"metadata":..,"block_bytes":..,"files":{..},"tensors":{..}},"tables":[
    {"tensor":"weight/a","files":..,"offsets":..,"shapes":..,"starts":..,"hashes":..},
    ...
    ]}

`hash` is the hash of `content`. `files` maps each shard to [bytes, bytes of its header, hash of the header]; `tensors` maps each
tensor to [dtype, shape, bytes of its table's line, hash of that line]. A rank reads the first line and only the tables of the
tensors it needs, because with 10,000 shards all tables take hundreds of megabytes (docs/design/checkpoint_format.md).
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, overload

from bagualu.fault_tolerance.checkpoint.layout import table
from bagualu.fault_tolerance.checkpoint.layout.blocks import open_file, unreadable
from bagualu.fault_tolerance.checkpoint.layout.format import (  # fmt: skip
    DTYPES,
    MANIFEST,
    REMEDY,
    CheckpointError,
    Manifest,
    StoredBox,
    StoredFile,
    StoredTensor,
    digest,
    step_of,
)

FORMAT = 2
_OPEN, _CONTENT, _TABLES, _CLOSE = b'{"hash":"', b'","content":', b',"tables":[\n', b"]}\n"
_FIELDS = {"format", "step", "metadata", "block_bytes", "files", "tensors"}
_MOST_LINE_BYTES = 2**30
_MOST_HEADER_BYTES = 100_000_000
"""The largest header of a shard, in bytes, that the safetensors library reads."""
_MOST_BLOCK_BYTES = 2**28
"""The largest block, in bytes, that a manifest may state. It bounds the memory for data that are not verified yet."""


def encode(manifest: Manifest) -> bytes:
    """Returns the bytes of manifest.json. Raises ValueError or TypeError for metadata that JSON does not preserve."""
    if json.loads(json.dumps(manifest.metadata, allow_nan=False)) != manifest.metadata:
        raise ValueError("metadata must be plain JSON: string keys, lists (no tuples), finite numbers, strings")
    numbers = {name: number for number, name in enumerate(manifest.files)}
    lines = [table.encode(name, tensor.boxes, numbers) + b",\n" for name, tensor in manifest.tensors.items()]
    if lines:
        lines[-1] = lines[-1][:-2] + b"\n"
    head = {
        "format": FORMAT,
        "step": manifest.step,
        "metadata": manifest.metadata,
        "block_bytes": manifest.block_bytes,
        "files": {name: [file.bytes, file.header_bytes, file.header_hash] for name, file in manifest.files.items()},
        "tensors": {
            name: [tensor.dtype, tensor.shape, len(line), digest(line)]
            for (name, tensor), line in zip(manifest.tensors.items(), lines, strict=True)
        },
    }
    content = json.dumps(head, allow_nan=False, separators=(",", ":")).encode()
    return b"".join([_OPEN, digest(content).encode(), _CONTENT, content, _TABLES, *lines, _CLOSE])


def read_manifest(path: Path) -> Manifest:
    """Returns the verified manifest of the checkpoint at `path`. The boxes of a tensor are read from the file and verified at their
    first use.

    Raises CheckpointError, here and at that first use.
    """
    try:
        with BufferedReader(open_file(path / MANIFEST)) as file:
            size = os.fstat(file.fileno()).st_size
            manifest = _decode(file.readline(_MOST_LINE_BYTES), size, path / MANIFEST)
            file.seek(size - len(_CLOSE))
            if file.read() != _CLOSE:
                raise ValueError("does not end as it was written: it was damaged or edited")
    except OSError as error:
        raise unreadable(f"{path}: {MANIFEST} cannot be read", error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} {error}; {REMEDY}") from error
    if step_of(path) not in (None, manifest.step):
        raise CheckpointError(f"{path}: {MANIFEST} is that of step {manifest.step}; remove this copy or rename it back")
    return manifest


class _Boxes(Sequence[StoredBox]):
    """The boxes of a tensor, which are read from manifest.json and verified at their first use."""

    def __init__(self, read: Callable[[], tuple[StoredBox, ...]]) -> None:
        self._read = read
        self._boxes: tuple[StoredBox, ...] | None = None

    def _all(self) -> tuple[StoredBox, ...]:
        if self._boxes is None:
            self._boxes = self._read()
        return self._boxes

    @overload
    def __getitem__(self, index: int) -> StoredBox: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[StoredBox, ...]: ...
    def __getitem__(self, index: int | slice) -> StoredBox | tuple[StoredBox, ...]:
        return self._all()[index]

    def __len__(self) -> int:
        return len(self._all())


def _decode(first: bytes, size: int, path: Path) -> Manifest:
    """Returns the manifest that the `first` line of the file `path` contains, a file of `size` bytes. Raises ValueError with a
    message that lacks the subject, e.g. "does not match its own hash"."""
    begin = len(_OPEN) + table.HASH_LENGTH
    hashed, content = first[len(_OPEN) : begin], first[begin + len(_CONTENT) : -len(_TABLES)]
    if first != _OPEN + hashed + _CONTENT + content + _TABLES or digest(content).encode() != hashed:
        raise ValueError("does not match its own hash: it was damaged or edited")
    head = json.loads(content)
    if type(head) is not dict or head.get("format") != FORMAT:
        raise ValueError(f"is in another format than {FORMAT}, which this version reads; use the version that wrote it")
    if head.keys() != _FIELDS or any(type(head[field]) is not dict for field in ("metadata", "files", "tensors")):
        raise ValueError("has other fields than this version writes")
    step, block_bytes = table.whole_numbers([head["step"], head["block_bytes"]])
    if not 0 < block_bytes <= _MOST_BLOCK_BYTES or block_bytes % 8:
        raise ValueError(f"has blocks of {block_bytes} bytes; they are a multiple of 8 and at most {_MOST_BLOCK_BYTES}")
    files = {name: _file(name, about) for name, about in head["files"].items()}
    manifest, names, at = Manifest(step, head["metadata"], block_bytes, files, digest=hashed.decode()), list(files), len(first)
    for name, about in head["tensors"].items():
        tensor, length, expected = _tensor(name, about)
        read = partial(_table, path, at, length, expected, name, tensor, manifest, names)
        manifest.tensors[name] = replace(tensor, boxes=_Boxes(read))
        at += length
    if at + len(_CLOSE) != size:
        raise ValueError(f"has {size} bytes instead of {at + len(_CLOSE)}")
    return manifest


def _file(name: str, about: Any) -> StoredFile:
    if re.fullmatch(r"[\w-][\w.-]*", name) is None or name == MANIFEST:
        raise ValueError(f"names {name!r}, which is not a valid name of a shard")
    if type(about) is not list or len(about) != 3:
        raise ValueError(f"has an invalid entry for file {name}")
    size, header = table.whole_numbers(about[:2])
    if not 8 <= header <= min(size, _MOST_HEADER_BYTES):
        raise ValueError(f"states a header of {header} bytes for {name}, a file of {size} bytes")
    return StoredFile(size, header, *table.hashes(about[2], 1))


def _tensor(name: str, about: Any) -> tuple[StoredTensor, int, str]:
    """Returns (tensor without its boxes, size in bytes of its table's line, hash of that line) from the manifest's entry `about`.
    Raises ValueError if the entry is invalid."""
    if type(about) is not list or len(about) != 4 or type(about[0]) is not str or about[0] not in DTYPES:
        raise ValueError(f"has an invalid entry for tensor {name}")
    tensor = StoredTensor(table.whole_numbers(about[1]), about[0], ())
    (length,) = table.whole_numbers(about[2:3])
    table.whole_numbers([prod(tensor.shape) * tensor.item_bytes])
    if not 0 < length <= _MOST_LINE_BYTES:
        raise ValueError(f"states {length} bytes for the table of tensor {name}")
    (hashed,) = table.hashes(about[3], 1)
    return tensor, length, hashed


def _table(
    path: Path, at: int, length: int, expected: str, name: str, tensor: StoredTensor, manifest: Manifest, files: list[str]
) -> tuple[StoredBox, ...]:
    """Returns the boxes of tensor `name` from the line of `length` bytes at byte `at` of the manifest. Raises CheckpointError if
    the line cannot be read or is damaged."""
    where = f"{path.parent}: {path.name}: the table of tensor {name}"
    try:
        with open_file(path) as file:
            line = os.pread(file.fileno(), length, at)
        if digest(line) != expected:
            raise ValueError(f"does not match its hash (bytes {at} to {at + length})")
        return table.decode(line.rstrip(b",\n"), name, tensor, manifest, files)
    except OSError as error:
        raise unreadable(f"{where} cannot be read", error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} {error}; {REMEDY}") from error
