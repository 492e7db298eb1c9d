"""Reads the files of a prepared corpus, and checks at every read that they are what they were when they were read whole."""

import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from bagualu.comm.errors import StorageError
from bagualu.trainer.data.checked import Checked, forget, known, remember, signatures

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
    """The tokens of the file `path`, or other whole numbers, as a flat array that stays on storage. Every read is verified with
    the hashes taken when the file was read whole.

    This is no memory map: if a mapped file is cut short, the rest of its last page reads as zeros, and an access beyond that page
    kills the process. If another file is renamed to `path`, reads continue on the original file.
    """

    def __init__(self, path: Path, vocab: int, hashes: NDArray[np.uint64] | None = None, dtype: str | None = None) -> None:
        """Reads the whole file, unless its `hashes` are known. `dtype`: by default that of tokens of the vocabulary. Raises
        OSError, and ValueError for a number that is not in the vocabulary and for a file that `hashes` cannot be of."""
        self.path, self._dtype = path, np.dtype(dtype or token_dtype(vocab))
        self._file = open(path, "rb")  # noqa: SIM115  open as long as this object exists
        weakref.finalize(self, self._file.close)
        self.digest = b""
        """Hash of the whole file, if it was read."""
        self.hashes = self._read_whole(self._file, vocab) if hashes is None else hashes
        self._bytes = os.fstat(self._file.fileno()).st_size
        if len(self.hashes) != -(-self._bytes // _BLOCK_BYTES):
            raise ValueError(f"{path.name} has another size than when it was read whole")

    def _read_whole(self, file: BinaryIO, vocab: int) -> NDArray[np.uint64]:
        """Returns the hashes of the blocks of the file, and sets `digest`. Raises OSError, ValueError."""
        hashes: list[int] = []
        whole = xxhash.xxh3_128()
        while portion := file.read(_PORTION):
            whole.update(portion)
            hashes += [xxhash.xxh3_64_intdigest(portion[at : at + _BLOCK_BYTES]) for at in range(0, len(portion), _BLOCK_BYTES)]
            if (largest := int(np.frombuffer(portion, self._dtype).max())) >= vocab:
                raise ValueError(f"{self.path.name} has token {largest}, but there are {vocab}")
        self.digest = whole.digest()
        return np.array(hashes, np.uint64)

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
            if xxhash.xxh3_64_intdigest(data[at : at + _BLOCK_BYTES]) != self.hashes[block]:
                raise self._lost(f"changed while it was in use, in the block at byte {block * _BLOCK_BYTES}")
        return np.frombuffer(data, self._dtype)[(start * item - begin) // item : (stop * item - begin) // item]

    def _read(self, begin: int, end: int) -> bytes:
        data = b""
        while begin + len(data) < end:
            try:
                portion = os.pread(self._file.fileno(), end - begin - len(data), begin + len(data))
            except OSError as error:
                raise StorageError(f"{self.path} cannot be read now ({error.strerror}); see whether its storage answers") from error
            if not portion:
                raise self._lost(
                    f"cut short while it was in use: it ends at byte {begin + len(data)} or before, and had {self._bytes}"
                )
            data += portion
        return data

    def _lost(self, how: str) -> DataError:
        """Returns the error for a file that has changed in this way, and has the next start read it whole."""
        forget(self.path.parent)
        return DataError(f"{self.path} was {how}; {_REMEDY}")


@dataclass(frozen=True)
class Prepared:
    """The files of a prepared corpus, open for reading; those of training and those of validation."""

    tokens: tuple[Tokens, Tokens]
    starts: tuple[Tokens, Tokens] | None
    answers: tuple[Tokens, Tokens] | None
    fingerprint: str
    """As `fingerprint` computes it."""


def open_prepared(folder: Path, vocab: int) -> Prepared:
    """Returns the files in `folder`. Reads all of them, unless a start before did and they have not changed since. Raises OSError,
    and ValueError for a token that is not in the vocabulary."""
    now = signatures(_files(folder))
    if checked := known(folder, now, vocab, _BLOCK_BYTES):
        return _opened(folder, vocab, checked)
    opened = _opened(folder, vocab)
    read = [tokens for pair in (opened.tokens, opened.starts, opened.answers) for tokens in pair or ()]
    whole = _combined([_digest(folder / _TOKENIZER), *(tokens.digest for tokens in read)])
    if signatures(_files(folder)) == now:
        checked = Checked(whole, {tokens.path.name: tokens.hashes for tokens in read})
        remember(folder, now, vocab, _BLOCK_BYTES, checked)
    return replace(opened, fingerprint=whole)


def _opened(folder: Path, vocab: int, checked: Checked | None = None) -> Prepared:
    """Returns the files in `folder`, which are read whole if nothing is known of them. Raises OSError, ValueError."""
    hashes = checked.hashes if checked else {}

    def both(names: tuple[str, str], vocab: int, dtype: str | None = None) -> tuple[Tokens, Tokens]:
        first, second = (Tokens(folder / name, vocab, hashes.get(name), dtype) for name in names)
        return first, second

    starts = both(STARTS, 2**63, "int64") if _exist(folder, STARTS) else None
    answers = both(ANSWERS, 2) if _exist(folder, ANSWERS) else None
    return Prepared(both(SPLITS, vocab), starts, answers, checked.fingerprint if checked else "")


def fingerprint(folder: Path) -> str:
    """Returns a hash of everything in `folder` that a model gets to see: the tokenizer, all tokens, and what is known of
    documents. Raises OSError."""
    return _combined(_digest(path) for path in _files(folder))


def _files(folder: Path) -> list[Path]:
    besides = [path for name in (*STARTS, *ANSWERS) if (path := folder / name).exists()]
    return [folder / _TOKENIZER, *(folder / name for name in SPLITS), *besides]


def _exist(folder: Path, names: Iterable[str]) -> bool:
    return all((folder / name).exists() for name in names)


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
