"""What lies in a checkpoint directory. Free of torch, so that it can be listed and verified without it.

    step-00000010/
        manifest.json               one JSON document, see `Manifest`; its first field is the hash of all the rest
        rank-00000.safetensors      the boxes rank 0 held; readable by any safetensors reader, and never executed

Every byte is under a hash taken in memory before it was written: the manifest by its own, the header of each shard by
`StoredFile.header_hash`, each box by one hash for every `block_bytes` of it. Blocks let a reader that needs a few rows
of a large tensor read and verify only those. Hashes are xxh3_128: they find damage, they do not stop a forger.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from bagualu.parallel.boxes import Box, cover_problem

FORMAT = 1
MANIFEST = "manifest.json"
BLOCK_BYTES = 16 * 2**20
"""A multiple of every item size, so that a block begins with a whole element."""

DTYPES = {
    "float64": ("F64", 8), "int64": ("I64", 8), "float32": ("F32", 4), "int32": ("I32", 4), "float16": ("F16", 2),
    "bfloat16": ("BF16", 2), "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip
"""Dtype in torch -> its name in safetensors, bytes of one element."""

REMEDY = "restore it from a copy or use an earlier checkpoint"
_HEAD, _MIDDLE, _TAIL = b'{"hash":"', b'","content":', b"}\n"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read. One line: where, which tensor, what is wrong, what to do."""


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
    key: str
    """Name of it in the safetensors header."""
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
    boxes: tuple[StoredBox, ...]

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Manifest:
    """The table of contents."""

    step: int
    metadata: dict[str, Any]
    block_bytes: int = BLOCK_BYTES
    files: dict[str, StoredFile] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

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


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json. Raises ValueError for metadata that JSON does not give back as it was."""
    if json.loads(json.dumps(manifest.metadata, allow_nan=False)) != manifest.metadata:
        raise ValueError("metadata must be plain JSON: string keys, lists (no tuples), finite numbers, strings")
    content = json.dumps({"format": FORMAT, **asdict(manifest)}, allow_nan=False, separators=(",", ":")).encode()
    return _HEAD + digest(content).encode() + _MIDDLE + content + _TAIL


def decode(raw: bytes) -> Manifest:
    """The manifest in `raw`. Raises ValueError, in a few words, when a byte differs from what was written."""
    begin = len(_HEAD) + 32 + len(_MIDDLE)
    hashed, content = raw[len(_HEAD) : len(_HEAD) + 32], raw[begin : -len(_TAIL)]
    if raw != _HEAD + hashed + _MIDDLE + content + _TAIL or digest(content).encode() != hashed:
        raise ValueError("does not match its own hash: it was damaged or edited")
    fields = json.loads(content)
    if fields.pop("format") != FORMAT:
        raise ValueError(f"is in another format than {FORMAT}, which this version reads; use the version that wrote it")
    fields["files"] = {name: StoredFile(**file) for name, file in fields["files"].items()}
    fields["tensors"] = {name: _tensor(tensor) for name, tensor in fields["tensors"].items()}
    return Manifest(**fields)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`, verified. Raises CheckpointError."""
    try:
        manifest = decode((path / MANIFEST).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error.strerror}); {REMEDY}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {MANIFEST} {error}; {REMEDY}") from error
    if step_of(path) not in (None, manifest.step):
        raise CheckpointError(f"{path}: {MANIFEST} is that of step {manifest.step}; remove this copy or rename it back")
    if any(Path(name).name != name for name in manifest.files):
        raise CheckpointError(f"{path}: {MANIFEST} names files outside the checkpoint; {REMEDY}")
    return manifest


def _tensor(fields: dict[str, Any]) -> StoredTensor:
    boxes = tuple(
        StoredBox(tuple(b["offset"]), tuple(b["shape"]), b["file"], b["key"], b["start"], tuple(b["hashes"]))
        for b in fields["boxes"]
    )
    return StoredTensor(tuple(fields["shape"]), fields["dtype"], boxes)
