"""Writes a rank's pieces to a safetensors file."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from bagualu.fault_tolerance.checkpoint.layout import format
from bagualu.fault_tolerance.checkpoint.layout.blocks import write_hashed
from bagualu.fault_tolerance.checkpoint.layout.durable import durable_file, fsync_directory, write_all
from bagualu.fault_tolerance.checkpoint.layout.format import DTYPES, StoredBox, StoredFile
from bagualu.parallel.boxes import Box


@dataclass(frozen=True)
class Piece:
    """A box of the global tensor `name`: it begins at `offset`, and `tensor` holds its values."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def key(self) -> str:
        """The name in the shard: the tensor's, with the offset appended unless the box is the whole tensor."""
        whole = tuple(self.tensor.shape) == tuple(self.global_shape)
        return self.name if whole else f"{self.name}@{','.join(map(str, self.offset))}"

    def check(self) -> None:
        """Raises ValueError if the box is not within its tensor or the dtype cannot be stored."""
        shape = tuple(self.tensor.shape)
        if not Box(tuple(self.offset), shape).inside(tuple(self.global_shape)):
            raise ValueError(f"tensor {self.name}: the piece at {tuple(self.offset)} of shape {shape} does not lie in "
                             f"{tuple(self.global_shape)}")  # fmt: skip
        if self.dtype not in DTYPES:
            raise ValueError(f"tensor {self.name}: dtype {self.dtype} cannot be stored; use one of {', '.join(DTYPES)}")


def write_shard(path: Path, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Writes `pieces` durably to the new file `path` and returns a report, in plain JSON, for the manifest.

    The report is {"file": fields of StoredFile, "boxes": [{"name", "global_shape", "dtype", "stored": fields of StoredBox}]}. If
    this rank has no elements at all, it writes no file and "file" is None. Raises OSError, ValueError.
    """
    checked = []
    for piece in pieces:
        piece.check()
        if piece.tensor.numel() or not prod(piece.global_shape):
            checked.append(piece)
    # The widest elements come first, so that every tensor begins at a multiple of its own item size.
    checked.sort(key=lambda piece: -piece.tensor.element_size())
    if not checked:
        return {"file": None, "boxes": []}
    header = _header(checked)
    at, boxes = len(header), []
    with durable_file(path) as file:
        write_all(file, header)
        for piece in checked:
            data = _bytes(piece.tensor)
            hashes = write_hashed(file, data, format.BLOCK_BYTES)
            stored = StoredBox(tuple(piece.offset), tuple(piece.tensor.shape), path.name, at, tuple(hashes))
            boxes.append({"name": piece.name, "global_shape": list(piece.global_shape), "dtype": piece.dtype,
                          "stored": asdict(stored)})  # fmt: skip
            at += len(data)
    fsync_directory(path.parent)
    return {"file": asdict(StoredFile(at, len(header), format.digest(header))), "boxes": boxes}


def _header(pieces: list[Piece]) -> bytes:
    """Returns the safetensors header: an 8-byte length and JSON, padded to a multiple of eight bytes. Raises ValueError."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in pieces:
        if piece.key in entries:
            raise ValueError(f"tensor {piece.name}: this rank gave the piece at {tuple(piece.offset)} twice")
        end = at + piece.tensor.numel() * piece.tensor.element_size()
        dtype, shape = DTYPES[piece.dtype][0], list(piece.tensor.shape)
        entries[piece.key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Returns the elements, row-major, in host memory. It copies only if they are not stored like that already."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
