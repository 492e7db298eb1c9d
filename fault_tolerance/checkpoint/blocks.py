"""Hashing and reading in blocks: every block of a stored box is verified on its way into memory. Free of torch."""

import errno
import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import xxhash

from bagualu.fault_tolerance.checkpoint.durable import write_all
from bagualu.fault_tolerance.checkpoint.format import (
    REMEDY,
    CheckpointError,
    CheckpointStorageError,
    Manifest,
    StoredBox,
    StoredFile,
    digest,
)

PORTION_BYTES = 2**18
"""Data is hashed and moved this much at a time, so that the second of the two finds it in the processor's cache."""


_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP)
"""What the system says of something that is not there, or is no file, on storage that answers."""


def unreadable(what: str, error: OSError) -> CheckpointError:
    """What to raise for `what`, e.g. "PATH: NAME cannot be read": it is damaged, or its storage does not give it now."""
    if error.errno in _NO_FILE:
        return CheckpointError(f"{what} ({error.strerror}); {REMEDY}")
    return CheckpointStorageError(f"{what} now ({error.strerror}); see whether its storage answers")


def portions(data: memoryview, block_bytes: int) -> Iterator[tuple[memoryview, bool]]:
    """`data` cut into portions, each with whether it is the last of its block."""
    for block in range(0, len(data), block_bytes):
        stop = min(block + block_bytes, len(data))
        for begin in range(block, stop, PORTION_BYTES):
            end = min(begin + PORTION_BYTES, stop)
            yield data[begin:end], end == stop


def write_hashed(descriptor: int, data: memoryview, block_bytes: int) -> list[str]:
    """Write `data` and return the hash of every block, taken from memory before the bytes go out. Raises OSError."""
    hashes, hasher = [], xxhash.xxh3_128()
    for portion, last in portions(data, block_bytes):
        hasher.update(portion)
        write_all(descriptor, portion)
        if last:
            hashes.append(hasher.hexdigest())
            hasher.reset()
    return hashes


def open_file(path: Path) -> FileIO:
    """The regular file `path`, open for reading. Raises OSError for anything else: a link, a device, a pipe nobody writes to."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, "it is a symbolic link") if error.errno == errno.ELOOP else error from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return FileIO(descriptor)


def open_shard(path: Path, manifest: Manifest, name: str, check_header: bool = True) -> FileIO:
    """The shard `name` of the checkpoint at `path`, its size and (unless told not to) header verified.

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
    """Fill `into` with the bytes of `stored` from block `first` on, verified. `where` begins the error message.

    `into` ends where a block does. Raises CheckpointError; then `into` holds bytes that must not be used.
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
    """What is wrong with each block of `stored`, which has `size` bytes. `buffer` has room for its largest block."""
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
