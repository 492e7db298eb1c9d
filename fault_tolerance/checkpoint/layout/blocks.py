"""Hashes, writes and reads boxes in blocks. Every block of a stored box is verified when it is read into memory."""

import errno
import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import xxhash

from bagualu.fault_tolerance.checkpoint.layout.durable import write_all
from bagualu.fault_tolerance.checkpoint.layout.format import (
    REMEDY,
    CheckpointError,
    CheckpointStorageError,
    Manifest,
    StoredBox,
    StoredFile,
    digest,
)

PORTION_BYTES = 2**18
"""The number of bytes that are hashed and then written, or read and then hashed, at a time: few enough to stay in the processor's
cache in between."""


_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP)
"""Error numbers of a file that is missing or is not a regular file; they show that the storage itself works."""


def unreadable(what: str, error: OSError) -> CheckpointError:
    """Returns the error to raise for `what`, e.g. "PATH: NAME cannot be read": CheckpointError if the file is missing or not a
    regular file, else CheckpointStorageError, because its storage does not work at the moment."""
    if error.errno in _NO_FILE:
        return CheckpointError(f"{what} ({error.strerror}); {REMEDY}")
    return CheckpointStorageError(f"{what} now ({error.strerror}); see whether its storage answers")


def portions(data: memoryview, block_bytes: int) -> Iterator[tuple[memoryview, bool]]:
    """Yields (portion, whether it ends a block) for consecutive portions of `data`, which begins at the start of a block."""
    for block in range(0, len(data), block_bytes):
        stop = min(block + block_bytes, len(data))
        for begin in range(block, stop, PORTION_BYTES):
            end = min(begin + PORTION_BYTES, stop)
            yield data[begin:end], end == stop


def write_hashed(descriptor: int, data: memoryview, block_bytes: int) -> list[str]:
    """Writes `data` and returns the hash of each of its blocks, taken from memory before the block's bytes are written. Raises
    OSError."""
    hashes, hasher = [], xxhash.xxh3_128()
    for portion, last in portions(data, block_bytes):
        hasher.update(portion)
        write_all(descriptor, portion)
        if last:
            hashes.append(hasher.hexdigest())
            hasher.reset()
    return hashes


def open_file(path: Path) -> FileIO:
    """Returns the regular file `path`, opened for reading. Raises OSError for anything else, e.g. a symbolic link or a pipe,
    without blocking."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, "it is a symbolic link") if error.errno == errno.ELOOP else error from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return FileIO(descriptor)


def open_shard(path: Path, manifest: Manifest, name: str, check_header: bool = True) -> FileIO:
    """Returns the shard file `name` of the checkpoint at `path`, opened for reading, after verifying its size and, with
    `check_header`, its header.

    Raises CheckpointError.
    """
    stored = manifest.files[name]
    try:
        file = open_file(path / name)
    except OSError as error:
        raise unreadable(f"{path}: {name} cannot be opened", error) from error
    try:
        size = file.seek(0, 2)
        if size != stored.bytes:
            raise CheckpointError(f"{path}: {name} has {size} bytes instead of {stored.bytes}; {REMEDY}")
        if check_header:
            _check_header(file, f"{path}: the header of {name}", stored)
    except BaseException:
        file.close()
        raise
    return file


def read_blocks(file: FileIO, where: str, stored: StoredBox, block_bytes: int, first: int, into: memoryview) -> None:
    """Fills `into` with bytes of `stored` from the start of its block `first` on, and verifies them. `where` begins the error
    message.

    `into` is as long as one or more whole blocks (the last block of `stored` may be shorter). Raises CheckpointError if a block
    does not match its hash or cannot be read; then the bytes in `into` must not be used.
    """
    hasher, block = xxhash.xxh3_128(), first
    try:
        file.seek(stored.start + first * block_bytes)
    except OSError as error:
        raise unreadable(f"{where} cannot be read", error) from error
    for portion, last in portions(into, block_bytes):
        _fill(file, portion, where)
        hasher.update(portion)
        if last:
            if hasher.hexdigest() != stored.hashes[block]:
                at = stored.start + block * block_bytes
                raise CheckpointError(f"{where} does not match its hash in the block at byte {at}; {REMEDY}")
            hasher.reset()
            block += 1


def damaged_blocks(file: FileIO, where: str, stored: StoredBox, size: int, block_bytes: int, buffer: bytearray) -> Iterator[str]:
    """Yields an error message for each block of `stored`, a box of `size` bytes, that is damaged or cannot be read. `buffer` has
    room for a block."""
    for block in range(len(stored.hashes)):
        try:
            read_blocks(file, where, stored, block_bytes, block, memoryview(buffer)[: size - block * block_bytes])
        except CheckpointError as error:
            yield str(error)


def _check_header(file: FileIO, where: str, stored: StoredFile) -> None:
    header = bytearray(stored.header_bytes)
    file.seek(0)
    _fill(file, memoryview(header), where)
    if digest(header) != stored.header_hash:
        raise CheckpointError(f"{where} does not match its hash; {REMEDY}")


def _fill(file: FileIO, into: memoryview, where: str) -> None:
    filled = 0
    while filled < len(into):
        try:
            count = file.readinto(into[filled:])
        except OSError as error:
            raise unreadable(f"{where} cannot be read", error) from error
        if not count:
            raise CheckpointError(f"{where} ends too early; {REMEDY}")
        filled += count
