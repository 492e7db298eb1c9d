"""Encodes the boxes of a stored tensor as a line of JSON with a list per field, and decodes and checks such a line.

    {"tensor":"weight/a","files":[0,1],"offsets":[[0,0],[3,0]],"shapes":[[3,4],[3,4]],"starts":[264,264],"hashes":["0a..","5b.."]}

`files` holds indices into the manifest's files. The hashes of a box's blocks are concatenated in a single string.
"""

import json
import re
from collections.abc import Sequence
from math import prod
from typing import Any

from bagualu.fault_tolerance.checkpoint.layout.format import Manifest, StoredBox, StoredTensor
from bagualu.parallel.boxes import Box, cover_problem

HASH_LENGTH = 32
_COLUMNS = ("files", "offsets", "shapes", "starts", "hashes")
_LARGEST = 2**63
_HEXADECIMAL = re.compile("[0-9a-f]*")


def encode(name: str, boxes: Sequence[StoredBox], files: dict[str, int]) -> bytes:
    """Returns the line that holds `boxes`, those of tensor `name`; `files` maps file names to their indices in the manifest."""
    columns = {
        "files": [files[box.file] for box in boxes],
        "offsets": [box.offset for box in boxes],
        "shapes": [box.shape for box in boxes],
        "starts": [box.start for box in boxes],
        "hashes": ["".join(box.hashes) for box in boxes],
    }
    return json.dumps({"tensor": name, **columns}, separators=(",", ":")).encode()


def decode(line: bytes, name: str, tensor: StoredTensor, manifest: Manifest, files: list[str]) -> tuple[StoredBox, ...]:
    """Returns the boxes of `tensor`, called `name`, from a line that `encode` made. `files` are the names of the manifest's files,
    in its order.

    Raises ValueError unless the boxes lie within their files and cover the tensor exactly once. The error's message lacks its
    subject, e.g. "has columns that are not lists of equal length".
    """
    fields = json.loads(line)
    if type(fields) is not dict or fields.keys() != {"tensor", *_COLUMNS} or fields["tensor"] != name:
        raise ValueError("has other fields than this version writes")
    columns = [fields[column] for column in _COLUMNS]
    if any(type(column) is not list or len(column) != len(columns[0]) for column in columns):
        raise ValueError("has columns that are not lists of equal length")
    numbers, starts = whole_numbers(columns[0]), whole_numbers(columns[3])
    if max(numbers, default=0) >= len(files):
        raise ValueError(f"has file index {max(numbers)}, but there are only {len(files)} files")
    offsets, shapes = (_indices(column, len(tensor.shape)) for column in columns[1:3])
    wrong = cover_problem(tensor.shape, [Box(*pair) for pair in zip(offsets, shapes, strict=True)])
    if wrong:
        raise ValueError(f"does not cover the tensor exactly once: {wrong}")
    rows = zip(offsets, shapes, [files[number] for number in numbers], starts, columns[4], strict=True)
    return tuple(_box(tensor, manifest, *row) for row in rows)


def _indices(column: list[Any], dims: int) -> list[tuple[int, ...]]:
    """Returns the offsets or shapes in `column` as tuples of `dims` integers each. Raises ValueError if they are anything else."""
    if any(type(index) is not list or len(index) != dims for index in column):
        raise ValueError(f"has offsets or shapes that are not {dims} numbers")
    whole_numbers([n for index in column for n in index])
    return [tuple(index) for index in column]


def _box(
    tensor: StoredTensor, manifest: Manifest, offset: tuple[int, ...], shape: tuple[int, ...], file: str, start: int, hashed: Any
) -> StoredBox:
    size, about = prod(shape) * tensor.item_bytes, manifest.files[file]
    if not about.header_bytes <= start <= start + size <= about.bytes:
        raise ValueError(f"has bytes {start} to {start + size} of {file}, whose data are {about.header_bytes} to {about.bytes}")
    return StoredBox(offset, shape, file, start, hashes(hashed, -(-size // manifest.block_bytes)))


def whole_numbers(value: Any) -> tuple[int, ...]:
    """Returns `value`, a list of integers, each at least 0 and less than 2**63, as a tuple. Raises ValueError if it is anything
    else."""
    whole = type(value) is list and set(map(type, value)) <= {int}
    if not whole or not 0 <= min(value, default=0) <= max(value, default=0) < _LARGEST:
        raise ValueError(f"has {str(value)[:40]} instead of whole numbers")
    return tuple(value)


def hashes(value: Any, count: int) -> tuple[str, ...]:
    """Returns the `count` hashes of which the string `value` consists. Raises ValueError if it is anything else."""
    if type(value) is not str or len(value) != count * HASH_LENGTH or not _HEXADECIMAL.fullmatch(value):
        raise ValueError(f"has {str(value)[:40]} instead of {count} hashes")
    return (value,) if count == 1 else tuple(value[at : at + HASH_LENGTH] for at in range(0, len(value), HASH_LENGTH))
