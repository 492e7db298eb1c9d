"""Writes the pieces of tensors that a rank holds to a safetensors file."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from bagualu.fault_tolerance.checkpoint.layout import format
from bagualu.fault_tolerance.checkpoint.layout.blocks import write_hashed
from bagualu.fault_tolerance.checkpoint.layout.durable import durable_file, fsync_directory, write_all
from bagualu.fault_tolerance.checkpoint.layout.format import DTYPES, StoredBox, StoredFile
from bagualu.parallel.boxes import Box


class Piece(Protocol):
    """A piece of a tensor to write: a TensorPiece, or a LazyPiece."""

    @property
    def name(self) -> str: ...
    @property
    def global_shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> tuple[int, ...]: ...
    @property
    def box(self) -> Box: ...
    @property
    def dtype(self) -> str: ...
    @property
    def tensor(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class LazyPiece:
    """A piece of a tensor whose values are made only when they are written, so that many pieces take little memory."""

    name: str
    global_shape: tuple[int, ...]
    box: Box
    dtype: str
    make: Callable[[], torch.Tensor]
    """Returns the values of the box, of this dtype."""

    @property
    def offset(self) -> tuple[int, ...]:
        return self.box.offset

    @property
    def tensor(self) -> torch.Tensor:
        return self.make()


def key_of(piece: Piece) -> str:
    """Returns the name of a piece within its shard: the tensor's name if the piece is the whole tensor, else NAME@OFFSET."""
    whole = piece.box.shape == tuple(piece.global_shape)
    return piece.name if whole else f"{piece.name}@{','.join(map(str, piece.offset))}"


def check_piece(piece: Piece) -> None:
    """Raises ValueError if the piece does not lie within its tensor or its dtype cannot be stored."""
    box = piece.box
    if not box.inside(tuple(piece.global_shape)):
        raise ValueError(f"tensor {piece.name}: the piece at {box.offset} of shape {box.shape} does not lie in "
                         f"{tuple(piece.global_shape)}")  # fmt: skip
    if piece.dtype not in DTYPES:
        raise ValueError(f"tensor {piece.name}: dtype {piece.dtype} cannot be stored; use one of {', '.join(DTYPES)}")


def write_shard(path: Path, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Writes `pieces` durably to the new file `path` and returns a report, in plain JSON, for the manifest.

    The report is {"file": fields of StoredFile, "boxes": [{"name", "global_shape", "dtype", "stored": fields of StoredBox}]}.
    Pieces without elements are left out, unless the whole tensor has none; if no piece remains, no file is written and "file" is
    None. Raises OSError if writing fails, ValueError if a piece is invalid or given twice.
    """
    checked = []
    for piece in pieces:
        check_piece(piece)
        if piece.box.elements or not prod(piece.global_shape):
            checked.append(piece)
    # The widest elements come first, so that every tensor begins at a multiple of its own item size.
    checked.sort(key=lambda piece: -DTYPES[piece.dtype][1])
    if not checked:
        return {"file": None, "boxes": []}
    header = _header(checked)
    at, boxes = len(header), []
    with durable_file(path) as file:
        write_all(file, header)
        for piece in checked:
            data = bytes_of(piece.tensor)
            hashes = write_hashed(file, data, format.BLOCK_BYTES)
            stored = StoredBox(piece.box.offset, piece.box.shape, path.name, at, tuple(hashes))
            boxes.append({"name": piece.name, "global_shape": list(piece.global_shape), "dtype": piece.dtype,
                          "stored": asdict(stored)})  # fmt: skip
            at += len(data)
    fsync_directory(path.parent)
    return {"file": asdict(StoredFile(at, len(header), format.digest(header))), "boxes": boxes}


def _header(pieces: list[Piece]) -> bytes:
    """Returns the safetensors header: an 8-byte length and JSON, padded to a multiple of eight bytes. Raises ValueError if a piece
    is given twice."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in pieces:
        key = key_of(piece)
        if key in entries:
            raise ValueError(f"tensor {piece.name}: this rank gave the piece at {tuple(piece.offset)} twice")
        dtype, item_bytes = DTYPES[piece.dtype]
        end = at + piece.box.elements * item_bytes
        entries[key] = {"dtype": dtype, "shape": list(piece.box.shape), "data_offsets": [at, end]}
        at = end
    return encode_header(entries)


def encode_header(entries: dict[str, Any]) -> bytes:
    """Returns the header of a safetensors file with these entries, with its length before it, padded to a multiple of eight
    bytes."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of the elements, row-major, in host memory. Copies them only if the tensor is on a device or not row-major
    in memory."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
