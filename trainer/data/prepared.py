"""Reads the files of a prepared corpus, and checks when they are opened and at every later read that they have not changed."""

import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bagualu.comm.errors import StorageError

_TOKENIZER, SPLITS = "tokenizer.json", ("train.bin", "validation.bin")
"""The file of the tokenizer; SPLITS: the files of the training tokens and of the validation tokens."""
STARTS, ANSWERS = ("train.starts", "validation.starts"), ("train.answers", "validation.answers")
"""Files that corpora of records have besides: where documents begin, and the end, as int64; and for each token of conversations
whether it is to be predicted, 1 or 0, as uint16."""
_BLOCK_BYTES = 2**16
"""The number of bytes in which tokens are read and verified; a memory map would read as much ahead. The hashes take 128 MB per
terabyte of tokens."""
_PORTION = 2**20
_REMEDY = "start again, which prepares the corpus anew"


class DataError(RuntimeError):
    """The tokens on storage are no longer those that the run began with."""


def token_dtype(vocab: int) -> str:
    """Returns the dtype in which the tokens of a vocabulary are stored."""
    return "uint16" if vocab <= 2**16 else "uint32"


class Tokens:
    """The tokens of the file `path`, as a flat array that stays on storage. Every read is verified with the hashes taken at
    opening.

    This is no memory map: if a mapped file is cut short, the rest of its last page reads as zeros, and an access beyond that page
    kills the process. If another file is renamed to `path`, reads continue on the original file.
    """

    def __init__(self, path: Path, vocab: int) -> None:
        """Reads the whole file. Raises OSError, and ValueError for a token that is not in the vocabulary."""
        self.path, self._dtype = path, np.dtype(token_dtype(vocab))
        self._file, self._bytes = open(path, "rb"), 0  # noqa: SIM115  open as long as this object exists
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
        """Returns the tokens of the slice `wanted`, whose step is ignored. Raises DataError if they have changed, StorageError if
        they cannot be read now."""
        item = self._dtype.itemsize
        start, stop, _ = wanted.indices(len(self))
        if stop <= start:
            return np.empty(0, self._dtype)
        first = start * item // _BLOCK_BYTES
        begin, end = first * _BLOCK_BYTES, min(-(-stop * item // _BLOCK_BYTES) * _BLOCK_BYTES, self._bytes)
        data = self._read(begin, end)
        for block, at in enumerate(range(0, len(data), _BLOCK_BYTES), first):
            if xxhash.xxh3_64_intdigest(data[at : at + _BLOCK_BYTES]) != self._hashes[block]:
                raise DataError(
                    f"{self.path} was changed while it was in use, in the block at byte {block * _BLOCK_BYTES}; {_REMEDY}"
                )
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
                                f"and had {self._bytes}; {_REMEDY}")  # fmt: skip
            data += portion
        return data


def open_splits(folder: Path, vocab: int) -> tuple[Tokens, Tokens, str]:
    """Returns the training and the validation tokens in `folder`, and their fingerprint (as `fingerprint` computes it). Raises
    OSError, and ValueError for a token that is not in the vocabulary."""
    train, validation = (Tokens(folder / name, vocab) for name in SPLITS)
    others = [_digest(path) for path in _besides(folder)]
    return train, validation, _combined([_digest(folder / _TOKENIZER), train.digest, validation.digest, *others])


def fingerprint(folder: Path) -> str:
    """Returns a hash of everything in `folder` that a model gets to see: the tokenizer, all tokens, and what is known of
    documents. Raises OSError."""
    return _combined(_digest(path) for path in (*(folder / name for name in (_TOKENIZER, *SPLITS)), *_besides(folder)))


def _besides(folder: Path) -> list[Path]:
    return [path for name in (*STARTS, *ANSWERS) if (path := folder / name).exists()]


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
