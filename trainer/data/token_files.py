"""Reads the headers of files of token ids in the formats of other programs. The tokens stay where they are.

megatron   PREFIX.bin holds the ids; PREFIX.idx their dtype and where sequences and documents begin (Megatron-LM and its forks)
llmc       256 int32 before the ids: magic number, version, count (llm.c); without the magic number, ids alone (nanoGPT)
olmo       ids alone (OLMo calls these files .npy too), or an array as numpy.save writes it
"""

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.listing import SourceError, printable
from bagualu.trainer.data.prepared import token_dtype

MEGATRON, LLMC, OLMO = "megatron", "llmc", "olmo"
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_INDEX_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""The codes of whole numbers. Codes 6, 7 and 9 are floating-point numbers, or mean other things in other versions."""
_NUMPY_MAGIC = b"\x93NUMPY"
_LLMC_HEADER_BYTES = 4 * 256
_LLMC_DTYPES = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
"""(magic number, version) -> dtype of the ids."""
_HEADER_BYTES = 2**16


@dataclass(frozen=True)
class TokenFile:
    """A file with `count` token ids of `dtype`, little-endian, from byte `offset_bytes` on."""

    path: str
    dtype: str
    count: int
    offset_bytes: int = 0
    headed: bool = True
    """Whether the file, or its index, says the dtype; else it is assumed."""
    index: "MegatronIndex | None" = None

    @property
    def name(self) -> str:
        """The path, as a line that any terminal can show."""
        return printable(self.path)


@dataclass(frozen=True)
class MegatronIndex:
    """What PREFIX.idx says: the numbers of sequences and documents, and the byte at which its arrays begin."""

    path: str
    sequences: int
    documents: int
    aligned: bool = False
    """Whether it is known that each document is one sequence."""

    @property
    def lengths_at(self) -> int:
        """The byte at which the lengths of the sequences (int32, tokens) begin; their byte offsets in PREFIX.bin (int64) follow."""
        return _INDEX_HEADER.size

    @property
    def pointers_at(self) -> int:
        return self.lengths_at + 4 * self.sequences

    @property
    def documents_at(self) -> int:
        """The byte at which the numbers of the documents' first sequences (int64) begin."""
        return self.pointers_at + 8 * self.sequences


def is_megatron_index(head: bytes) -> bool:
    return head.startswith(_INDEX_MAGIC)


def is_llmc(head: bytes) -> bool:
    """Whether a file that begins with `head` has the magic number of llm.c's token files."""
    return len(head) >= 8 and struct.unpack("<ii", head[:8])[0] in {magic for magic, _ in _LLMC_DTYPES}


def read_head(path: str) -> bytes:
    """Returns the first bytes of a file. Raises SourceError."""
    try:
        with open(path, "rb") as stream:
            return stream.read(_HEADER_BYTES)
    except OSError as error:
        raise SourceError(
            f"{printable(path)} cannot be read ({error.strerror}); put it right or give another data.source"
        ) from error


def describe(path: str, kind: str, vocab: int, given: str | None) -> TokenFile:
    """Returns what the header of the token file `path` of format `kind` says. `path` is PREFIX for megatron.

    `given`: data.token_dtype, for files without a header; by default the dtype follows from `vocab`. Raises SourceError if the file
    cannot be read, RecipeError if it is not of that format, is cut short, or says its dtype although `given` is not None.
    """
    if kind == MEGATRON:
        file = _megatron(path)
    else:
        head, size = read_head(path), os.stat(path).st_size
        if kind == LLMC and is_llmc(head):
            file = _llmc(path, head, size)
        elif kind == OLMO and head.startswith(_NUMPY_MAGIC):
            file = _numpy(path, head, size)
        else:
            file = _bare(path, size, given or token_dtype(vocab))
    if given is not None and file.headed and given != file.dtype:
        raise RecipeError(f"data.token_dtype={given}, but {file.name} says that its tokens are {file.dtype}; leave it out")
    if not file.count:
        raise RecipeError(f"{file.name} holds no tokens; give a data.source that does")
    return file


def _megatron(prefix: str) -> TokenFile:
    index, tokens = f"{prefix}.idx", f"{prefix}.bin"
    head = read_head(index)
    if not is_megatron_index(head) or len(head) < _INDEX_HEADER.size:
        raise RecipeError(f"{printable(index)} is not an index of Megatron (MMIDIDX); give data.source=PREFIX of PREFIX.bin and "
                          "PREFIX.idx, which tools/preprocess_data.py of Megatron-LM writes")  # fmt: skip
    _, version, code, sequences, documents = _INDEX_HEADER.unpack_from(head)
    if version != 1:
        raise RecipeError(f"{printable(index)} has version {version} of Megatron's index, not 1; write it again with Megatron-LM")
    if code not in _INDEX_DTYPES:
        raise RecipeError(f"{printable(index)} says that the tokens have type number {code}, which is no whole number or differs "
                          f"between versions of Megatron; write them as uint16 (8) or int32 (4)")  # fmt: skip
    about = MegatronIndex(index, sequences, documents - 1)
    if os.stat(index).st_size < about.documents_at + 8 * documents or not documents:
        raise RecipeError(f"{printable(index)} is cut short: {sequences} sequences and {documents} documents take "
                          f"{about.documents_at + 8 * documents} bytes; copy it again")  # fmt: skip
    dtype = np.dtype(_INDEX_DTYPES[code])
    read_head(tokens)  # whether it can be read
    count, rest = divmod(os.stat(tokens).st_size, dtype.itemsize)
    if rest:
        raise RecipeError(f"{printable(tokens)} is cut short: its size is no multiple of {dtype.itemsize} bytes; copy it again")
    return TokenFile(tokens, dtype.name, count, index=about)


def _llmc(path: str, head: bytes, size: int) -> TokenFile:
    magic, version, count = struct.unpack("<iii", head[:12])
    dtype = _LLMC_DTYPES.get((magic, version))
    if dtype is None:
        known = ", ".join(f"{version} with {magic}" for magic, version in _LLMC_DTYPES)
        raise RecipeError(f"{printable(path)} has version {version} of llm.c's token files with the magic number {magic}; known "
                          f"are {known}: write it again")  # fmt: skip
    expected = _LLMC_HEADER_BYTES + count * np.dtype(dtype).itemsize
    if size != expected:
        raise RecipeError(f"{printable(path)} is cut short or has been appended to: its header says {count} tokens, {expected} "
                          f"bytes, and it has {size}; copy it again")  # fmt: skip
    return TokenFile(path, dtype, count, _LLMC_HEADER_BYTES)


def _numpy(path: str, head: bytes, size: int) -> TokenFile:
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise RecipeError(
            f"{printable(path)} begins as numpy's arrays do, but its header is wrong ({error}); save it again"
        ) from error
    if len(shape) != 1 or dtype.kind not in "ui" or dtype.newbyteorder("<") != dtype:
        raise RecipeError(f"{printable(path)} is an array {list(shape)} of {dtype}, not a flat one of whole numbers; save "
                          "tokens.reshape(-1).astype('uint32')")  # fmt: skip
    if size != stream.tell() + shape[0] * dtype.itemsize:
        raise RecipeError(f"{printable(path)} is cut short: its header says {shape[0]} tokens; copy it again")
    return TokenFile(path, dtype.name, shape[0], stream.tell())


def _bare(path: str, size: int, dtype: str) -> TokenFile:
    count, rest = divmod(size, np.dtype(dtype).itemsize)
    if rest:
        raise RecipeError(f"{printable(path)} has {size} bytes, no multiple of those of a token of {dtype}; give the right "
                          "data.token_dtype, or copy it again if it is cut short")  # fmt: skip
    return TokenFile(path, dtype, count, headed=False)


def document_offsets(index: MegatronIndex) -> NDArray[np.int64]:
    """Returns the offsets in bytes [documents] at which the documents begin in PREFIX.bin: a memory map if each is one sequence.
    Raises OSError."""
    data = np.memmap(index.path, np.uint8, "r")
    pointers = data[index.pointers_at : index.documents_at].view(np.int64).view(np.ndarray)
    firsts = data[index.documents_at : index.documents_at + 8 * index.documents].view(np.int64).view(np.ndarray)
    if index.aligned:
        return pointers
    offsets: NDArray[np.int64] = pointers[firsts[firsts < index.sequences]]
    return offsets


def prefix_of(path: str) -> str:
    """Returns PREFIX for PREFIX.bin and PREFIX.idx, and any other path as it is."""
    root, ending = os.path.splitext(path)
    return root if ending in (".bin", ".idx") else path


def has_index(path: str) -> bool:
    """Whether `path` is PREFIX, PREFIX.bin or PREFIX.idx of a pair of Megatron's files."""
    prefix = prefix_of(path)
    return Path(f"{prefix}.bin").is_file() and Path(f"{prefix}.idx").is_file() and is_megatron_index(read_head(f"{prefix}.idx"))
