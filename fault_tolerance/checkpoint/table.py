"""The boxes of one stored tensor as one line of JSON, in columns, and the checks before any of it is believed. Free of torch.

    {"tensor":"weight/a","files":[0,1],"offsets":[[0,0],[3,0]],"shapes":[[3,4],[3,4]],"starts":[264,264],"hashes":["0a..","5b.."]}

`files` count from 0 in the order of the manifest; the hashes of a box's blocks stand in one string, one after the other.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from bagualu.fault_tolerance.checkpoint.format import Manifest, StoredBox, StoredTensor
from bagualu.parallel.boxes import cover_problem

HASH_LENGTH = 32
_COLUMNS = ("files", "offsets", "shapes", "starts", "hashes")
_LARGEST = 2**63


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
    boxes = tuple(_box(tensor, manifest, files, *row) for row in zip(*columns, strict=True))
    wrong = cover_problem(tensor.shape, [stored.box for stored in boxes])
    if wrong:
        raise ValueError(f"is not held exactly once: {wrong}")
    return boxes


def whole_numbers(value: Any) -> tuple[int, ...]:
    """A list of integers that are not negative and fit in 64 bits. Raises ValueError."""
    if type(value) is not list or any(type(n) is not int or not 0 <= n < _LARGEST for n in value):
        raise ValueError(f"has {str(value)[:40]} where a list of whole numbers must be")
    return tuple(value)


def hashes(value: Any, count: int) -> tuple[str, ...]:
    """`count` hashes that stand in one string. Raises ValueError."""
    if type(value) is not str or len(value) != count * HASH_LENGTH or re.fullmatch("[0-9a-f]*", value) is None:
        raise ValueError(f"has {str(value)[:40]} where {count} hashes must be")
    return tuple(value[at : at + HASH_LENGTH] for at in range(0, len(value), HASH_LENGTH))


def _box(tensor: StoredTensor, manifest: Manifest, files: list[str], *row: Any) -> StoredBox:
    file, offset, shape, start, hashed = row
    number, begin = whole_numbers([file, start])
    if number >= len(files):
        raise ValueError(f"names file number {number} of {len(files)}")
    stored = StoredBox(whole_numbers(offset), whole_numbers(shape), files[number], begin, ())
    if not stored.box.inside(tensor.shape):
        raise ValueError(f"has the box at {stored.offset} of shape {stored.shape}, which does not lie in {tensor.shape}")
    size, about = tensor.bytes_of(stored), manifest.files[stored.file]
    if not about.header_bytes <= begin <= begin + size <= about.bytes:
        raise ValueError(f"has bytes {begin} to {begin + size} of {stored.file}, which holds {about.header_bytes} to {about.bytes}")
    blocks = -(-size // manifest.block_bytes)
    return StoredBox(stored.offset, stored.shape, stored.file, begin, hashes(hashed, blocks))
