"""Tokens on storage: what is read is what was there when the file was opened, or an error that names the file and the place."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from bagualu.comm.errors import StorageError
from bagualu.trainer.data import prepared
from bagualu.trainer.data.prepared import DataError, Tokens

VOCAB = 300
BLOCK = 2**15  # tokens


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCAB, 3 * BLOCK + 1234).astype(np.uint16)


@pytest.fixture
def path(tmp_path: Path, tokens: np.ndarray) -> Path:
    (tmp_path / "train.bin").write_bytes(tokens.tobytes())
    return tmp_path / "train.bin"


def test_any_part_is_what_was_written(path: Path, tokens: np.ndarray) -> None:
    stored = Tokens(path, VOCAB)
    assert len(stored) == len(tokens)
    edges = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, len(tokens) - 1, len(tokens), len(tokens) + 9]
    for start in edges:
        for stop in edges:
            assert np.array_equal(stored[start:stop], tokens[start:stop])
    wide = Tokens(path, 2**32)
    assert np.array_equal(wide[5:20000], np.frombuffer(tokens.tobytes(), np.uint32)[5:20000])


@pytest.mark.parametrize("size", [0, 1, 2 * BLOCK, 2 * 2 * BLOCK - 2, 6 * BLOCK + 2467])
def test_a_file_cut_short_gives_what_is_left_and_no_zeros(path: Path, tokens: np.ndarray, size: int) -> None:
    """Also where the cut is within a page, of which a map would show the rest as zeros."""
    stored = Tokens(path, VOCAB)
    os.truncate(path, size)
    for start in range(0, len(tokens) - 16, 257):
        block_end = min((start + 15) // BLOCK * BLOCK + BLOCK, len(tokens)) * 2
        if block_end <= size:
            assert np.array_equal(stored[start : start + 16], tokens[start : start + 16])
        else:
            with pytest.raises(
                DataError, match=rf"{path} was cut short while it was in use: it ends at byte \d+ .* had {2 * len(tokens)}"
            ):
                stored[start : start + 16]


def test_a_changed_byte_is_found_by_whoever_reads_its_block_and_by_nobody_else(path: Path, tokens: np.ndarray) -> None:
    stored = Tokens(path, VOCAB)
    raw = bytearray(path.read_bytes())
    raw[2 * BLOCK + 77] ^= 1
    with path.open("r+b") as file:
        file.write(raw)
    assert np.array_equal(stored[:BLOCK], tokens[:BLOCK])
    assert np.array_equal(stored[2 * BLOCK :], tokens[2 * BLOCK :])
    for part in (slice(BLOCK, BLOCK + 1), slice(2 * BLOCK - 1, 2 * BLOCK), slice(0, len(tokens))):
        with pytest.raises(
            DataError, match=rf"{path} was changed while it was in use, in the block at byte {2 * BLOCK}; start again"
        ):
            stored[part]


def test_a_file_that_another_has_taken_the_place_of_is_read_on(path: Path, tokens: np.ndarray) -> None:
    stored = Tokens(path, VOCAB)
    other = path.with_name("other")
    other.write_bytes(tokens[::-1].tobytes())
    other.replace(path)
    assert np.array_equal(stored[:], tokens)
    path.unlink()
    assert np.array_equal(stored[:], tokens)


def test_storage_that_does_not_answer_is_not_damage(path: Path, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, read = Tokens(path, VOCAB), os.pread

    def fail(*_: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(prepared.os, "pread", fail)
    with pytest.raises(StorageError, match=r"train\.bin cannot be read now \(Stale file handle\)"):
        stored[0:10]
    monkeypatch.setattr(prepared.os, "pread", lambda d, n, at: read(d, min(n, 1000), at))  # and one that answers in small pieces
    assert np.array_equal(stored[:], tokens)


def test_files_are_closed(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        Tokens(path, VOCAB)
        with pytest.raises(ValueError, match="has token"):
            Tokens(path, 2)
    assert len(os.listdir("/proc/self/fd")) == before
