"""Reads a token file once from its beginning to its end: for its fingerprint, and for ids that are in no vocabulary.

The result is cached beside the prepared corpora, under the path of the file, and holds for as long as size and modification time of
the file stay the same. So a run starts and resumes in constant time, and a file that was moved is read once more.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import xxhash
from filelock import FileLock

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.files import write_atomic
from bagualu.trainer.data.token_files import MegatronIndex, TokenFile

FORMAT = 1
"""A number in the name of a cached result. Raise it when what is stored changes."""
_PORTION = 2**23


@dataclass(frozen=True)
class Scanned:
    """What reading all of a token file showed."""

    signature: list[int]
    """Size in bytes and modification time in nanoseconds of the file and of its index, if it has one, when it was read."""
    digest: str
    """Hash of all bytes of the file and of its index."""
    least: int
    most: int
    """The smallest and the largest id."""
    halves: bool = False
    """Whether every second id is 0, as in 4-byte ids that are read as 2-byte ids."""
    documents_are_sequences: bool = True
    """Whether each document of a Megatron index is one sequence."""


def scan(file: TokenFile, cache: Path) -> Scanned:
    """Returns the result of reading all of `file`, from the cache if the file has not changed since. Several processes may
    call this at the same time: one reads. Raises OSError, and RecipeError for an index that does not fit its tokens."""
    key = hashlib.blake2b(json.dumps([FORMAT, os.path.abspath(file.path), file.dtype, file.offset_bytes]).encode(), digest_size=16)
    folder = cache / "scanned"
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"{key.hexdigest()}.json"
    if known := _known(record, signature(file)):
        return known
    with FileLock(f"{record}.reading"):
        if known := _known(record, signature(file)):
            return known
        before = signature(file)
        scanned = replace(_scan(file), signature=before)
        if signature(file) != before:
            raise RecipeError(f"{file.name} changed while it was read; start again when it no longer changes")
        write_atomic(record, json.dumps(asdict(scanned)).encode())
        return scanned


def signature(file: TokenFile) -> list[int]:
    """Returns size and modification time of the file and of its index. Raises OSError."""
    paths = [file.path] if file.index is None else [file.path, file.index.path]
    return [number for status in map(os.stat, paths) for number in (status.st_size, status.st_mtime_ns)]


def _known(record: Path, now: list[int]) -> Scanned | None:
    try:
        scanned = Scanned(**json.loads(record.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return scanned if scanned.signature == now else None


def _scan(file: TokenFile) -> Scanned:
    whole, dtype = xxhash.xxh3_128(), np.dtype(file.dtype)
    least, most, odd = np.iinfo(dtype).max, np.iinfo(dtype).min, 0
    with open(file.path, "rb") as stream:
        whole.update(stream.read(file.offset_bytes))
        while portion := stream.read(_PORTION):  # whole ids, since _PORTION is a multiple of their size
            whole.update(portion)
            ids = np.frombuffer(portion, dtype)
            least, most, odd = min(least, int(ids.min())), max(most, int(ids.max())), max(odd, int(ids[1::2].max(initial=0)))
    aligned = file.index is None or _check_index(file, file.index, whole)
    return Scanned([], whole.hexdigest(), least, most, dtype.itemsize == 2 and file.count > 1 and odd == 0, aligned)


def _check_index(file: TokenFile, index: MegatronIndex, whole: "xxhash.xxh3_128") -> bool:
    """Adds the index to the hash and checks that its sequences follow each other and fill the file. Returns whether each document
    is one sequence. Raises RecipeError."""
    data = np.memmap(index.path, np.uint8, "r")
    whole.update(data.data)
    lengths = data[index.lengths_at : index.pointers_at].view(np.int32)
    pointers = data[index.pointers_at : index.documents_at].view(np.int64)
    firsts = data[index.documents_at : index.documents_at + 8 * (index.documents + 1)].view(np.int64)
    item = np.dtype(file.dtype).itemsize
    ends = np.cumsum(lengths, dtype=np.int64) * item
    follow = not len(pointers) or (pointers[0] == 0 and np.array_equal(pointers[1:], ends[:-1]) and ends[-1] == file.count * item)
    if not follow or (len(lengths) and lengths.min() < 0):
        raise RecipeError(f"{index.path} does not fit {file.name}: its {index.sequences} sequences do not follow each other from "
                          f"the first to the last of {file.count} tokens; copy both files again")  # fmt: skip
    if firsts[0] != 0 or firsts[-1] != index.sequences or (np.diff(firsts) < 0).any():
        raise RecipeError(f"{index.path} is damaged: its documents do not cover its {index.sequences} sequences; copy it again")
    return bool(index.documents == index.sequences and np.array_equal(firsts, np.arange(index.sequences + 1)))
