"""The files of a prepared corpus, and whether they are what was prepared: when they are opened, and at every read after that."""

import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from bagualu.comm.errors import StorageError

_TOKENIZER, SPLITS = "tokenizer.json", ("train.bin", "validation.bin")
"""SPLITS: the tokens to train on, and to validate with."""
_BLOCK_BYTES = 2**16
"""Read and verified at a time: what a memory map would read ahead anyway. Its hashes take 128 MB for a terabyte of tokens."""
_PORTION = 2**20


class DataError(RuntimeError):
    """The tokens on storage are no longer those that the run has begun with."""


def token_dtype(vocab: int) -> str:
    """How the tokens of a vocabulary are stored."""
    return "uint16" if vocab <= 2**16 else "uint32"


class Tokens:
    """The tokens of the file `path`, flat, where they lie. Every read is held against the hashes taken when it was opened.

    No memory map: of a file that is cut short under a map the rest of the page reads as zeros, and what is behind it ends the
    process. A file that another has taken the place of, by a rename, is read on as it was.
    """

    def __init__(self, path: Path, vocab: int) -> None:
        """Reads all of it. Raises OSError, and ValueError for a token that the vocabulary does not have."""
        self.path, self._dtype = path, np.dtype(token_dtype(vocab))
        self._file, self._bytes = open(path, "rb"), 0  # noqa: SIM115  as long as this object
        weakref.finalize(self, self._file.close)
        whole, hashes = xxhash.xxh3_128(), []
        while portion := self._file.read(_PORTION):
            whole.update(portion)
            hashes += [xxhash.xxh3_64_intdigest(portion[at : at + _BLOCK_BYTES]) for at in range(0, len(portion), _BLOCK_BYTES)]
            if (largest := int(np.frombuffer(portion, self._dtype).max())) >= vocab:
                raise ValueError(f"{path.name} has token {largest}, but there are {vocab}")
            self._bytes += len(portion)
        self.digest: bytes = whole.digest()
        self._hashes: NDArray[np.uint64] = np.array(hashes, np.uint64)

    def __len__(self) -> int:
        return self._bytes // self._dtype.itemsize

    def __getitem__(self, wanted: slice) -> NDArray[Any]:
        """Tokens wanted.start .. wanted.stop. Raises DataError, or StorageError where they cannot be read now."""
        item = self._dtype.itemsize
        start, stop, _ = wanted.indices(len(self))
        if stop <= start:
            return np.empty(0, self._dtype)
        first = start * item // _BLOCK_BYTES
        begin, end = first * _BLOCK_BYTES, min(-(-stop * item // _BLOCK_BYTES) * _BLOCK_BYTES, self._bytes)
        data = self._read(begin, end)
        for block, at in enumerate(range(0, len(data), _BLOCK_BYTES), first):
            if xxhash.xxh3_64_intdigest(data[at : at + _BLOCK_BYTES]) != self._hashes[block]:
                raise DataError(f"{self.path} was changed while it was in use, in the block at byte {block * _BLOCK_BYTES}")
        return np.frombuffer(data, self._dtype)[(start * item - begin) // item : (stop * item - begin) // item]

    def _read(self, begin: int, end: int) -> bytes:
        data = b""
        while begin + len(data) < end:
            try:
                portion = os.pread(self._file.fileno(), end - begin - len(data), begin + len(data))
            except OSError as error:
                raise StorageError(f"{self.path} cannot be read now ({error.strerror}); see whether its storage answers") from error
            if not portion:
                raise DataError(f"{self.path} was cut short while it was in use: it ends at byte {begin + len(data)} or before, "
                                f"and had {self._bytes}")  # fmt: skip
            data += portion
        return data


AnyTokens: TypeAlias = "NDArray[Any] | Tokens"
"""Flat tokens, in memory or on storage."""


def open_splits(folder: Path, vocab: int) -> tuple[Tokens, Tokens, str]:
    """The training and validation tokens in `folder`, and the fingerprint of what was read. Raises OSError, ValueError."""
    train, validation = (Tokens(folder / name, vocab) for name in SPLITS)
    return train, validation, _combined([_digest(folder / _TOKENIZER), train.digest, validation.digest])


def fingerprint(folder: Path) -> str:
    """Hash of everything in `folder` that a model gets to see. Raises OSError."""
    return _combined(_digest(folder / name) for name in (_TOKENIZER, *SPLITS))


def _combined(digests: Iterable[bytes]) -> str:
    whole = xxhash.xxh3_128()
    for digest in digests:
        whole.update(digest)
    return str(whole.hexdigest())


def _digest(path: Path) -> bytes:
    part = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while portion := stream.read(_PORTION):
            part.update(portion)
    return bytes(part.digest())
