"""The boxes of one stored tensor as one line of JSON, in columns, and the checks before any of it is believed. Free of torch.

    {"tensor":"weight/a","files":[0,1],"offsets":[[0,0],[3,0]],"shapes":[[3,4],[3,4]],"starts":[264,264],"hashes":["0a..","5b.."]}

`files` count from 0 in the order of the manifest; the hashes of a box's blocks stand in one string, one after the other.
"""

import json
import re
from collections.abc import Sequence
from math import prod
from typing import Any

from bagualu.fault_tolerance.checkpoint.format import Manifest, StoredBox, StoredTensor
from bagualu.parallel.boxes import Box, cover_problem

HASH_LENGTH = 32
_COLUMNS = ("files", "offsets", "shapes", "starts", "hashes")
_LARGEST = 2**63
_HEXADECIMAL = re.compile("[0-9a-f]*")


def encode(name: str, boxes: Sequence[StoredBox], files: dict[str, int]) -> bytes:
    """The line of tensor `name`; `files` gives each file's number."""
    columns = {
        "files": [files[box.file] for box in boxes],
        "offsets": [box.offset for box in boxes],
        "shapes": [box.shape for box in boxes],
        "starts": [box.start for box in boxes],
        "hashes": ["".join(box.hashes) for box in boxes],
    }
    return json.dumps({"tensor": name, **columns}, separators=(",", ":")).encode()


def decode(line: bytes, name: str, tensor: StoredTensor, manifest: Manifest, files: list[str]) -> tuple[StoredBox, ...]:
    """The boxes of `tensor`, called `name`, in a line that `encode` wrote. `files`: those of the manifest, in its order.

    Raises ValueError, in a few words, unless they lie within their files and make up the tensor, each element once.
    """
    fields = json.loads(line)
    if type(fields) is not dict or fields.keys() != {"tensor", *_COLUMNS} or fields["tensor"] != name:
        raise ValueError("is not what this version writes")
    columns = [fields[column] for column in _COLUMNS]
    if any(type(column) is not list or len(column) != len(columns[0]) for column in columns):
        raise ValueError("has columns that are no lists of one length")
    numbers, starts = whole_numbers(columns[0]), whole_numbers(columns[3])
    if max(numbers, default=0) >= len(files):
        raise ValueError(f"names file number {max(numbers)} of {len(files)}")
    offsets, shapes = (_indices(column, len(tensor.shape)) for column in columns[1:3])
    wrong = cover_problem(tensor.shape, [Box(*pair) for pair in zip(offsets, shapes, strict=True)])
    if wrong:
        raise ValueError(f"is not held exactly once: {wrong}")
    rows = zip(offsets, shapes, [files[number] for number in numbers], starts, columns[4], strict=True)
    return tuple(_box(tensor, manifest, *row) for row in rows)


def _indices(column: list[Any], dims: int) -> list[tuple[int, ...]]:
    """Offsets or shapes, each of `dims` whole numbers. Raises ValueError."""
    if any(type(index) is not list or len(index) != dims for index in column):
        raise ValueError(f"has offsets or shapes that are not {dims} numbers")
    whole_numbers([n for index in column for n in index])
    return [tuple(index) for index in column]


def _box(
    tensor: StoredTensor, manifest: Manifest, offset: tuple[int, ...], shape: tuple[int, ...], file: str, start: int, hashed: Any
) -> StoredBox:
    size, about = prod(shape) * tensor.item_bytes, manifest.files[file]
    if not about.header_bytes <= start <= start + size <= about.bytes:
        raise ValueError(f"has bytes {start} to {start + size} of {file}, which holds {about.header_bytes} to {about.bytes}")
    return StoredBox(offset, shape, file, start, hashes(hashed, -(-size // manifest.block_bytes)))


def whole_numbers(value: Any) -> tuple[int, ...]:
    """A list of integers that are not negative and fit in 64 bits. Raises ValueError."""
    whole = type(value) is list and set(map(type, value)) <= {int}
    if not whole or not 0 <= min(value, default=0) <= max(value, default=0) < _LARGEST:
        raise ValueError(f"has {str(value)[:40]} where whole numbers must be")
    return tuple(value)


def hashes(value: Any, count: int) -> tuple[str, ...]:
    """`count` hashes that stand in one string. Raises ValueError."""
    if type(value) is not str or len(value) != count * HASH_LENGTH or not _HEXADECIMAL.fullmatch(value):
        raise ValueError(f"has {str(value)[:40]} where {count} hashes must be")
    return (value,) if count == 1 else tuple(value[at : at + HASH_LENGTH] for at in range(0, len(value), HASH_LENGTH))
