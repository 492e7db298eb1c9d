"""Remembers that the files of a prepared corpus were read whole, so that later starts take a constant time.

The record CACHE/KEY/checked.npz holds what reading all of them showed: their fingerprint, and the hashes by which later reads are
verified. It holds for as long as size and times of every file stay the same; otherwise they are read whole once more.
"""

import io
import json
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bagualu.fault_tolerance.files import write_atomic

_RECORD, _ABOUT = "checked.npz", "about"
Signatures = dict[str, list[int]]
"""By the name of a file, its size in bytes, and when its contents and its status were last changed, in nanoseconds."""


@dataclass(frozen=True)
class Checked:
    """What reading all files of a corpus showed. `hashes`: by the name of a file, those of its blocks."""

    fingerprint: str
    hashes: dict[str, NDArray[np.uint64]]


def signatures(paths: Iterable[Path]) -> Signatures:
    """Raises OSError."""
    found = {path.name: path.stat() for path in paths}
    return {name: [status.st_size, status.st_mtime_ns, status.st_ctime_ns] for name, status in found.items()}


def known(folder: Path, now: Signatures, vocab: int, block_bytes: int) -> Checked | None:
    """Returns what was remembered of the files in `folder`; None if nothing was, or not of files with the signatures `now`, of a
    vocabulary of `vocab` entries, in blocks of `block_bytes`."""
    try:
        with np.load(folder / _RECORD, allow_pickle=False) as record:
            about = json.loads(record[_ABOUT].tobytes())
            if [about["signatures"], about["vocab"], about["block_bytes"]] != [now, vocab, block_bytes]:
                return None
            return Checked(str(about["fingerprint"]), {name: record[name] for name in record.files if name != _ABOUT})
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def remember(folder: Path, signatures: Signatures, vocab: int, block_bytes: int, checked: Checked) -> None:
    """Keeps what reading the files in `folder` showed, where it can be written."""
    about = {"signatures": signatures, "vocab": vocab, "block_bytes": block_bytes, "fingerprint": checked.fingerprint}
    arrays: dict[str, NDArray[np.generic]] = {_ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8), **checked.hashes}
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]  # the names of the arrays are no other arguments
    with suppress(OSError):
        write_atomic(folder / _RECORD, stream.getvalue())


def forget(folder: Path) -> None:
    """Has the next start read the files in `folder` whole."""
    with suppress(OSError):
        (folder / _RECORD).unlink(missing_ok=True)
