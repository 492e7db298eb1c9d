import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data import build, checked, prepared, reading
from bagualu.trainer.data.build import documents
from bagualu.trainer.data.checked import signatures
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.corpus import check_source, prepare
from bagualu.trainer.data.listing import TextFile
from bagualu.trainer.data.prepared import DataError, Tokens, fingerprint
from bagualu.trainer.data.sources import find_files
from bagualu.trainer.data.split import by_files
from bagualu.trainer.data.tokenised import bits_per_byte
from bagualu.trainer.data.tokenizer import END_OF_FILE_TOKEN, load_tokenizer
from bagualu.trainer.user_settings import default_cache

VOCAB = 300


def config(folder: Path, cache: Path, **changes) -> DataConfig:
    defaults = {"source": str(folder), "cache": str(cache), "sequence_length": 16, "validation_fraction": 0.25}
    return DataConfig(**(defaults | changes))


def texts_of(folder: Path, files: Sequence[TextFile] = ()) -> list[tuple[str, bool]]:
    """Every document's text, and whether it is kept for validation."""
    files = files or find_files(str(folder))
    parts = documents(files, by_files(files, 0.25), str(folder))
    return [("".join(document.part.pieces()), document.validation) for document in parts]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("preparing a corpus must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_the_tokens_are_the_text(folder, tmp_path):
    corpus = prepare(config(folder, tmp_path / "cache"), VOCAB)
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    assert tokenizer.get_vocab_size() == corpus.vocab == len(corpus.token_bytes) == VOCAB
    found = texts_of(folder)
    for tokens, validation in ((corpus.train[:], False), (corpus.validation[:], True)):
        assert tokens[-1] == END_OF_FILE_TOKEN
        files = np.split(tokens, np.flatnonzero(tokens == END_OF_FILE_TOKEN) + 1)[:-1]
        texts = [text for text, kept in found if kept == validation]
        assert [tokenizer.decode(file[:-1].tolist()) for file in files] == texts
        assert corpus.token_bytes[tokens].sum() == sum(len(text.encode()) for text in texts)


_AGAIN = """
import hashlib, sys
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.data.config import DataConfig
c = prepare({config!r}, {vocab})
digest = hashlib.sha256(c.train[:].tobytes() + c.validation[:].tobytes()).hexdigest()
print(c.fingerprint, digest, "datasets" in sys.modules, "torch" in sys.modules)
"""


def test_the_second_time_is_the_first_and_needs_neither_datasets_nor_torch(folder, tmp_path):
    first = prepare(config(folder, tmp_path / "cache"), VOCAB)
    program = _AGAIN.format(config=config(folder, tmp_path / "cache"), vocab=VOCAB)
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    digest = hashlib.sha256(first.train[:].tobytes() + first.validation[:].tobytes()).hexdigest()
    assert answer.stdout.split() == [first.fingerprint, digest, "False", "False"]


def test_the_fingerprint_is_of_what_the_model_sees(folder, tmp_path):
    first = prepare(config(folder, tmp_path / "cache"), VOCAB).fingerprint
    shutil.copytree(folder, tmp_path / "moved")
    assert prepare(config(tmp_path / "moved", tmp_path / "other"), VOCAB).fingerprint == first
    assert prepare(config(folder, tmp_path / "cache"), VOCAB + 1).fingerprint != first
    assert prepare(config(folder, tmp_path / "cache", validation_fraction=0.5), VOCAB).fingerprint != first
    (folder / "part0" / "0.txt").write_text("something else")
    assert prepare(config(folder, tmp_path / "cache"), VOCAB).fingerprint != first


def _fingerprint(folder: Path, cache: Path) -> tuple[str, float]:
    corpus = prepare(config(folder, cache), VOCAB)
    return corpus.fingerprint, corpus.tokenizer_path.stat().st_mtime_ns


def test_several_processes_prepare_once(folder, tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        results = pool.starmap(_fingerprint, [(folder, tmp_path / "cache")] * 4, chunksize=1)
    assert len(set(results)) == 1
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


_KILLED = """
import sys, time
import bagualu.trainer.data.build as build
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.data.config import DataConfig
build.make_durable = lambda path: (print("all files written", flush=True), time.sleep(600))
prepare({config!r}, {vocab})
"""


def test_a_killed_builder_leaves_nothing_that_is_loaded(folder, tmp_path):
    """Killed at the worst moment: everything is written and nothing renamed yet."""
    cache = tmp_path / "cache"
    program = _KILLED.format(config=config(folder, cache), vocab=VOCAB)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as builder:
        assert builder.stdout.readline() == b"all files written\n"
        builder.send_signal(signal.SIGKILL)
    left = [path for path in cache.iterdir() if path.is_dir()]
    assert [".tmp-" in path.name for path in left] == [True]
    torn = next(left[0].rglob("train.bin"))
    torn.write_bytes(b"\0" * torn.stat().st_size)
    corpus = prepare(config(folder, cache), VOCAB)
    assert corpus.fingerprint == prepare(config(folder, tmp_path / "other"), VOCAB).fingerprint
    assert corpus.train[:].any()
    assert [path for path in cache.iterdir() if path.is_dir()] == [corpus.tokenizer_path.parent]


def test_a_shortened_file_is_prepared_again(folder, tmp_path):
    first = prepare(config(folder, tmp_path / "cache"), VOCAB)
    tokens = first.train[:]
    path = first.tokenizer_path.parent / "train.bin"
    os.truncate(path, path.stat().st_size - 2)
    assert np.array_equal(prepare(config(folder, tmp_path / "cache"), VOCAB).train[:], tokens)


@pytest.mark.parametrize(
    ("changes", "vocab", "message"),
    [
        ({"sequence_length": 10**6}, VOCAB, r"split of .* has \d+ tokens .* give data\.sequence_length=\d+"),
        ({}, 100, r"model\.vocab=100 cannot hold every byte .* give model\.vocab=257"),
        ({}, 10**6, r"yields only \d+ tokens; give model\.vocab=\d+"),
        ({"cache": "/proc/none"}, VOCAB, r"give data\.cache=FOLDER"),
    ],
)
def test_what_cannot_work_says_what_to_give(folder, tmp_path, changes, vocab, message):
    with pytest.raises(RecipeError, match=message):
        prepare(config(folder, **({"cache": tmp_path / "cache"} | changes)), vocab)


def test_a_file_that_is_not_text_is_a_recipe_error(folder, tmp_path):
    (folder / "image.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(RecipeError, match=r"image\.png is not UTF-8"):
        prepare(config(folder, tmp_path / "cache"), VOCAB)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_random_needs_no_files(tmp_path):
    corpus = prepare(DataConfig(source="random", cache=str(tmp_path / "cache")), 8192)
    assert corpus.tokenizer_path is None
    assert not (tmp_path / "cache").exists()
    assert bits_per_byte(3.0, float(corpus.token_bytes.sum())) is None


def test_bits_per_byte():
    assert bits_per_byte(8 * np.log(2), 2) == pytest.approx(4)


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert default_cache() == Path("/some/where/bagualu")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "bagualu"


def damaged_at(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json", "corpus.json"])
def test_a_damaged_cache_is_prepared_again_and_said_to_be(folder, tmp_path, caplog, name):
    """Every file: a byte at its ends and in the middle, cut to nothing, one byte and half, gone."""
    first = prepare(config(folder, tmp_path / "cache"), VOCAB)
    path = first.tokenizer_path.parent / name
    good = path.read_bytes()
    damages = [lambda at=at: damaged_at(path, at) for at in (0, len(good) // 2, len(good) - 1)]
    damages += [lambda n=n: os.truncate(path, n) for n in (0, 1, len(good) // 2)] + [path.unlink]
    for damage in damages:
        damage()
        caplog.clear()
        again = prepare(config(folder, tmp_path / "cache"), VOCAB)
        assert again.fingerprint == first.fingerprint
        assert path.read_bytes() == good
        assert "is damaged" in caplog.text
        caplog.clear()
        prepare(config(folder, tmp_path / "cache"), VOCAB)
        assert not caplog.text


def test_a_token_the_vocabulary_does_not_have_is_not_trained_on(folder, tmp_path, caplog):
    """Even where the fingerprint was made to fit."""
    first = prepare(config(folder, tmp_path / "cache"), VOCAB)
    cached = first.tokenizer_path.parent
    tokens = first.train[:]
    wrong = tokens.copy()
    wrong[7] = VOCAB
    (cached / "train.bin").write_bytes(wrong.tobytes())
    (cached / "corpus.json").write_text(json.dumps({"fingerprint": fingerprint(cached)}))
    assert np.array_equal(prepare(config(folder, tmp_path / "cache"), VOCAB).train[:], tokens)
    assert f"train.bin has token {VOCAB}" in caplog.text


@pytest.mark.parametrize("what", ["longer", "same size", "gone"])
def test_a_file_that_changes_while_it_is_read_is_refused(folder, what):
    files = find_files(str(folder))
    path = folder / "part0" / "0.txt"
    if what == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[::-1] if what == "same size" else path.read_bytes() + b"more")
        os.utime(path, ns=(1, 1))
    with pytest.raises(RecipeError, match=r"0\.txt (has changed while it was read|cannot be read)"):
        texts_of(folder, files=files)


def test_the_tokenizer_is_trained_on_no_more_text_than_it_is_said_to_be(folder, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", 100)
    parts = [reading.whole(file) for file in find_files(str(folder))]
    assert sum(part.size_bytes for part in parts) > 10_000
    assert [sum(map(len, build._sample(parts, most))) for most in (1, 99, 2_345)] == [1, 99, 2_345]


def test_a_prepared_corpus_is_read_whole_once(folder, tmp_path, monkeypatch):
    """The first process that loads the corpus reads every byte, even if another process prepared it; later ones do not."""
    first = prepare(config(folder, tmp_path / "cache"), VOCAB)
    tokens = first.train[:], first.validation[:]

    def refuse(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(Tokens, "_read_whole", refuse)
    again = prepare(config(folder, tmp_path / "cache"), VOCAB)
    assert again.fingerprint == first.fingerprint
    assert all(np.array_equal(*pair) for pair in zip(tokens, (again.train[:], again.validation[:]), strict=True))
    os.utime(first.tokenizer_path, ns=(1, 1))
    with pytest.raises(AssertionError, match="read again"):
        prepare(config(folder, tmp_path / "cache"), VOCAB)


@pytest.mark.parametrize("damage", ["cut", "garbage", "of other files", "of another vocabulary"])
def test_a_record_of_what_was_read_that_does_not_fit_is_no_obstacle(folder, tmp_path, caplog, damage):
    first = prepare(config(folder, tmp_path / "cache"), VOCAB)
    record = first.tokenizer_path.with_name("checked.npz")
    good = record.read_bytes()
    if damage == "cut":
        os.truncate(record, len(good) // 2)
    elif damage == "garbage":
        damaged_at(record, good.index(first.fingerprint.encode()))
    elif damage == "of other files":
        shutil.copy(prepare(config(folder, tmp_path / "other"), VOCAB).tokenizer_path.with_name("checked.npz"), record)
    else:
        shutil.copy(prepare(config(folder, tmp_path / "cache"), VOCAB + 1).tokenizer_path.with_name("checked.npz"), record)
    again = prepare(config(folder, tmp_path / "cache"), VOCAB)
    assert (again.fingerprint, caplog.text) == (first.fingerprint, "")
    assert np.array_equal(again.train[:], first.train[:])


def test_damage_that_keeps_size_and_time_is_found(folder, tmp_path):
    """The next process that loads the corpus finds it, because the file's ctime has changed."""
    first = prepare(config(folder, tmp_path / "cache"), VOCAB)
    path = first.tokenizer_path.with_name("train.bin")
    good, status = path.read_bytes(), path.stat()
    damaged_at(path, 10)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    prepare(config(folder, tmp_path / "cache"), VOCAB)
    assert path.read_bytes() == good


def test_damage_that_nothing_shows_is_found_where_it_is_read_and_prepared_again(folder, tmp_path, monkeypatch):
    first = prepare(config(folder, tmp_path / "cache"), VOCAB)
    path = first.tokenizer_path.with_name("train.bin")
    good = path.read_bytes()
    now = signatures([path.with_name(name) for name in ("tokenizer.json", "train.bin", "validation.bin")])
    damaged_at(path, len(good) - 1)
    with monkeypatch.context() as unnoticed:
        unnoticed.setattr(prepared, "signatures", lambda _: now)
        blind = prepare(config(folder, tmp_path / "cache"), VOCAB)
        for _ in range(2):
            with pytest.raises(DataError, match=r"train\.bin was changed while it was in use, .*; start again, which prepares"):
                blind.train[len(blind.train) - 1 :]
        assert path.read_bytes() != good
        prepare(config(folder, tmp_path / "cache"), VOCAB)
    assert path.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_read(folder, tmp_path, monkeypatch):
    first = prepare(config(folder, tmp_path / "cache"), VOCAB)
    first.tokenizer_path.with_name("checked.npz").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checked, "write_atomic", full)
    assert prepare(config(folder, tmp_path / "cache"), VOCAB).fingerprint == first.fingerprint
    assert not first.tokenizer_path.with_name("checked.npz").exists()


@pytest.mark.parametrize("files", [1, 40])
def test_other_text_is_kept_for_validation(folder, tmp_path, files):
    """Then all text of the source is for training, and its tokenizer is trained on that, also on a single file."""
    source = folder if files > 1 else folder / "part0" / "0.txt"
    held = tmp_path / "held"
    held.mkdir()
    for name in ("a", "b"):
        (held / name).write_text(f"{name} word or two")
    data = config(source, tmp_path / "cache", validation=str(held), validation_fraction=0.99, sequence_length=8)
    check_source(data, VOCAB)
    corpus = prepare(data, VOCAB)
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    for tokens, below in ((corpus.train[:], source), (corpus.validation[:], held)):
        ended = np.split(tokens, np.flatnonzero(tokens == END_OF_FILE_TOKEN) + 1)[:-1]
        texts = [path.read_text() for path in (below.rglob("*") if below.is_dir() else [below]) if path.is_file()]
        assert sorted(tokenizer.decode(document[:-1].tolist()) for document in ended) == sorted(texts)
    (held / "a").write_text("other words or two")
    assert prepare(data, VOCAB).fingerprint != corpus.fingerprint
    assert len(prepare(data, VOCAB, validation=False).validation) == 0
    np.arange(300, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    with pytest.raises(RecipeError, match=r"data\.validation=.*ids\.bin holds token ids, and data\.source text; give text"):
        check_source(config(source, tmp_path / "cache", validation=str(tmp_path / "ids.bin")), VOCAB)
