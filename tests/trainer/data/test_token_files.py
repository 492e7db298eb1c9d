"""Token files of other programs: the ids are read as they are, and what is wrong with a file is said before a run begins."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data import scan
from bagualu.trainer.data.batches import SOURCE_IDS, Batches
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.corpus import check_source, prepare
from bagualu.trainer.data.listing import SourceError
from bagualu.trainer.data.mapped import MappedFile, MappedTokens
from bagualu.trainer.data.prepared import DataError
from bagualu.trainer.data.token_files import TokenFile
from bagualu.trainer.data.tokenised import Corpus
from tests.trainer.data.test_records import make_tokenizer
from tests.trainer.data.token_files import write_llmc, write_megatron

IDS = np.random.default_rng(0).integers(1, 300, 1000).tolist()
DOCUMENTS = [IDS[:10], IDS[10:400], IDS[400:401], IDS[401:]]


def write(folder: Path, kind: str) -> Path:
    """Writes IDS; returns the data.source."""
    path = folder / "ids"
    if kind.startswith("megatron"):
        write_megatron(path, DOCUMENTS, kind.partition(" ")[2])
        return path
    if kind == "llm.c":
        write_llmc(path.with_suffix(".bin"), IDS)
    elif kind == "llm.c of Llama 3":
        write_llmc(path.with_suffix(".bin"), IDS, 20240801, 7, "uint32")
    elif kind == "nanoGPT":
        np.array(IDS, np.uint16).tofile(path.with_suffix(".bin"))
    elif kind == "OLMo":
        np.array(IDS, np.uint16).tofile(path.with_suffix(".npy"))
    else:
        np.save(path.with_suffix(".npy"), np.array(IDS, kind.partition(" ")[2]))
    return path.with_suffix(".npy" if "OLMo" in kind or "numpy" in kind else ".bin")


KINDS = [
    *("megatron uint16", "megatron int32", "megatron int64", "llm.c", "llm.c of Llama 3", "nanoGPT", "OLMo"),
    *("numpy uint32", "numpy int64"),
]


def config(source: Path, **changes: Any) -> DataConfig:
    fixed = {"source": str(source), "cache": str(source.parent / "cache"), "sequence_length": 8, "global_batch": 4}
    return DataConfig(**{**fixed, "validation_fraction": 0.1, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_reads_the_ids_of_the_file(tmp_path: Path, kind: str) -> None:
    data = config(write(tmp_path, kind))
    corpus = prepare(data, 300)
    assert isinstance(corpus.train, MappedTokens)
    assert corpus.train[:].tolist() == IDS[:900]
    assert corpus.validation[:].tolist() == IDS[900:]
    assert (corpus.tokenizer_path, corpus.split, corpus.endless) == (None, "tail", False)
    expected = np.array(IDS, np.int64)
    ours = Batches(corpus, data, seed=3)
    plain = Batches(Corpus(300, expected[:900], expected[900:], corpus.token_bytes, "", None), data, seed=3)
    for step in (0, 27, 10**9):
        for mine, other in zip(ours.batch(step, 1, 3), plain.batch(step, 1, 3), strict=True):
            assert torch.equal(mine, other)


def test_no_copy_is_made_and_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = config(write(tmp_path, "nanoGPT"))
    first = prepare(data, 300)
    assert sorted(path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()) == [".json", ".reading"]
    monkeypatch.setattr(scan, "_scan", None)  # a second reading would call it
    assert prepare(data, 300).fingerprint == first.fingerprint


@pytest.mark.parametrize("kind", ["megatron uint16", "llm.c", "OLMo"])
def test_a_folder_of_files_is_one_array_in_the_order_of_their_names(tmp_path: Path, kind: str) -> None:
    (tmp_path / "all").mkdir()
    for name in ("b", "a"):
        path = write(tmp_path, kind)
        for part in tmp_path.glob("ids.*"):
            part.rename(tmp_path / "all" / f"{name}{part.suffix}")
    corpus = prepare(config(path.parent / "all", validation_fraction=0.25), 300)
    assert corpus.train[:].tolist() == IDS + IDS[:500]
    assert corpus.train[995:1005].tolist() == IDS[995:] + IDS[:5]
    assert corpus.train[1000:1003].tolist() == IDS[:3]
    assert corpus.validation[:7].tolist() == IDS[500:507]
    assert corpus.validation[500:600].tolist() == []


def test_other_files_may_be_kept_for_validation(tmp_path: Path) -> None:
    source = write(tmp_path, "nanoGPT")
    np.array(IDS[::-1], np.uint16).tofile(tmp_path / "other.bin")
    corpus = prepare(config(source, validation=str(tmp_path / "other.bin")), 300)
    assert (corpus.train[:].tolist(), corpus.validation[:].tolist(), corpus.split) == (IDS, IDS[::-1], "apart")
    alone = prepare(config(source), 300, validation=False)
    assert (len(alone.train), len(alone.validation), alone.split) == (1000, 0, "none")


def test_the_fingerprint_tells_ids_and_shares_apart(tmp_path: Path) -> None:
    source = write(tmp_path, "nanoGPT")
    kept = prepare(config(source), 300).fingerprint
    assert prepare(config(source, validation_fraction=0.2), 300).fingerprint != kept
    assert prepare(config(source), 300, validation=False).fingerprint != kept
    source.rename(tmp_path / "moved.bin")
    assert prepare(config(tmp_path / "moved.bin"), 300).fingerprint == kept
    ids = np.fromfile(tmp_path / "moved.bin", np.uint16)
    ids[500] ^= 1
    ids.tofile(tmp_path / "moved.bin")
    assert prepare(config(tmp_path / "moved.bin"), 300).fingerprint != kept


@pytest.mark.parametrize(("how", "said"), [("cut", "cut short"), ("change", "changed")])
def test_a_file_that_changes_under_a_run_is_noticed(tmp_path: Path, how: str, said: str) -> None:
    data = config(write(tmp_path, "nanoGPT"))
    batches = Batches(prepare(data, 300), data, seed=0)
    batches.batch(0, 0, 4)
    if how == "cut":
        os.truncate(data.source, 10)
    else:
        os.utime(data.source, ns=(1, 1))
    with pytest.raises(DataError, match=rf"^sequence \d+ of data\.source=.* is lost: .*ids\.bin was {said} while it was in"):
        batches.batch(1, 0, 4)


def _patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(data)


BAD: list[tuple[str, str, Callable[[Path], Any], str]] = [
    ("megatron uint16", ".idx", lambda p: _patch(p, 0, b"x"), "is not an index of Megatron"),
    ("megatron uint16", ".idx", lambda p: _patch(p, 9, b"\x02"), "version 2 of Megatron's index, not 1"),
    ("megatron uint16", ".idx", lambda p: _patch(p, 17, b"\x06"), "type number 6, which is no whole number"),
    ("megatron uint16", ".idx", lambda p: os.truncate(p, 60), "cut short: 4 sequences and 5 documents take 122 bytes"),
    ("megatron uint16", ".idx", lambda p: _patch(p, 34, b"\x09"), "its 4 sequences do not follow each other"),
    ("megatron uint16", ".idx", lambda p: _patch(p, 82, b"\x01"), "its documents do not cover"),
    ("megatron uint16", ".bin", lambda p: os.truncate(p, 1001), "no multiple of 2 bytes"),
    ("megatron uint16", ".bin", lambda p: os.truncate(p, 1000), "do not follow each other from the first to the last of 500"),
    ("megatron int32", ".bin", lambda p: _patch(p, 80, b"\xff\xff\xff\xff"), "has token -1, but model.vocab=300; tokenise it"),
    ("llm.c", ".bin", lambda p: os.truncate(p, 2000), "its header says 1000 tokens, 3024 bytes, and it has 2000"),
    ("llm.c", ".bin", lambda p: _patch(p, 4, b"\x03"), "version 3 of llm.c's token files"),
    ("llm.c", ".bin", lambda p: _patch(p, 1100, b"\x2c\x01"), "has token 300, but model.vocab=300; give model.vocab=301 or more"),
    ("nanoGPT", ".bin", lambda p: os.truncate(p, 1999), "has 1999 bytes, no multiple of those of a token of uint16"),
    ("nanoGPT", ".bin", lambda p: os.truncate(p, 0), "holds no t"),
    ("nanoGPT", ".bin", lambda p: os.truncate(p, 10), "has 4 tokens|has 5 tokens|has 1 tokens"),
    ("nanoGPT", ".bin", lambda p: np.array(IDS, np.uint32).tofile(p), "every second token .* is 0.* give data.token_dtype=uint32"),
    ("numpy uint32", ".npy", lambda p: np.save(p, np.zeros((3, 5), np.uint16)), r"an array \[3, 5\] of uint16, not a flat one"),
    ("numpy uint32", ".npy", lambda p: np.save(p, np.zeros(50)), r"an array \[50\] of float64"),
    ("numpy uint32", ".npy", lambda p: os.truncate(p, 200), "cut short: its header says 1000 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "ending", "damage", "message"), BAD)
def test_a_bad_file_is_refused_in_one_line_before_a_run(
    tmp_path: Path, kind: str, ending: str, damage: Callable[[Path], Any], message: str
) -> None:
    source = write(tmp_path, kind)
    check_source(config(source), 300)
    damage(tmp_path / f"ids{ending}")
    given = {"megatron": "megatron", "llm.c": "llmc", "nanoGPT": "llmc", "numpy": "olmo"}[kind.split()[0]]
    with pytest.raises(RecipeError, match=message) as error:
        check_source(config(source, format=given), 300)
    assert "\n" not in str(error.value)


def test_a_tokenizer_tells_how_much_text_ids_stand_for(tmp_path: Path) -> None:
    made = make_tokenizer(tmp_path)
    corpus = prepare(config(write(tmp_path, "nanoGPT"), tokenizer=str(made)), 320)
    assert corpus.tokenizer_path == made / "tokenizer.json"
    assert (corpus.token_bytes[:2].tolist(), corpus.token_bytes[2:258].tolist()) == ([0, 0], [1] * 256)


def test_keys_that_do_not_fit_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some words")
    with pytest.raises(RecipeError, match=r"token_dtype=uint16 is for files of token ids, and data.source=.*text is text"):
        check_source(config(tmp_path / "text", token_dtype="uint16"), 300)
    with pytest.raises(RecipeError, match=r"data\.token_dtype=uint32, but .* says that its tokens are uint16; leave it out"):
        check_source(config(write(tmp_path, "llm.c"), token_dtype="uint32"), 300)
    with pytest.raises(RecipeError, match=r"has token .* or data\.token_dtype=uint16 if its tokens are not uint32"):
        check_source(config(write(tmp_path, "nanoGPT"), token_dtype="uint32"), 300)
    with pytest.raises(RecipeError, match=r"data\.validation=.*text is no file of tokens"):
        check_source(config(write(tmp_path, "nanoGPT"), validation=str(tmp_path / "text")), 300)
    for wrong in ({"format": "csv"}, {"token_dtype": "float"}, {"source": "stdlib", "format": "text"}):
        with pytest.raises(RecipeError, match=r"is unknown; give one of|is for files, and data\.source=stdlib has none"):
            DataConfig(**{"source": "text", **wrong}).validate()
    with pytest.raises(SourceError, match=r"gone\.bin.* cannot be read"):
        check_source(config(tmp_path / "gone.bin", format="llmc"), 300)


def test_every_rank_may_take_any_part_of_a_step_far_away(tmp_path: Path) -> None:
    """Ids of samples over three epochs that end within a step, however many ranks share a step."""
    data = config(write(tmp_path, "megatron uint16"), validation_fraction=0.104)  # 111 sequences of 896 tokens
    batches = Batches(prepare(data, 300), data, seed=5)
    first = 10**6 * batches.train_count
    steps = range(first // 4, first // 4 + 3 * batches.train_count // 4 + 1)
    used = Counter(int(index) for step in steps for index in batches.sample_ids(step))
    assert batches.train_count == 111
    assert sum(used.values()) == 4 * len(steps)
    assert set(used.values()) <= {3, 4}


def test_windows_reach_over_the_ends_of_files(tmp_path: Path) -> None:
    """Windows begin in any file and end in any later one; the files hold ids of 2 and of 4 bytes."""
    everything, files = [], []
    for number, (count, dtype) in enumerate([(5, "uint16"), (1, "uint32"), (12, "uint16"), (3, "uint16"), (20, "uint32")]):
        ids = np.random.default_rng(number).integers(0, 60_000, count)
        ids.astype(dtype).tofile(tmp_path / str(number))
        files.append(MappedFile(TokenFile(str(tmp_path / str(number)), dtype, count)))
        everything += ids.tolist()
    for parts, ids in ((files, everything), (files[-1:], everything[-20:])):
        for start, stop in ((0, len(ids)), (2, len(ids) - 3)):
            tokens = MappedTokens(parts, start, stop)
            for length in (1, 2, 9):
                starts = np.random.default_rng(length).permutation(stop - start - length + 1)
                found = tokens.windows(starts, length)
                assert found.flags.c_contiguous
                assert found.tolist() == [ids[start + at : start + at + length] for at in starts.tolist()]
            if len(parts) == 1:
                with pytest.raises(IndexError):
                    tokens.windows(np.array([stop - start - 8]), 9)


def test_a_blend_reads_each_sample_from_its_source(tmp_path: Path) -> None:
    sources = {}
    for name, count in (("a", 300), ("b", 500)):
        sources[name] = np.random.default_rng(count).integers(0, 300, count)
        sources[name].astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    entries = [{"source": str(tmp_path / "a.bin"), "weight": 1}, {"source": str(tmp_path / "b.bin"), "weight": 3}]
    data = config(tmp_path / "a.bin", blend=entries)
    batches = Batches(prepare(data, 300), data, seed=4)
    ids = list(sources.values())
    for step in range(20):
        inputs, labels = batches.batch(step, 0, 4)
        for row, sample in enumerate(batches.sample_ids(step).tolist()):
            source, index = divmod(sample, SOURCE_IDS)
            assert inputs[row].tolist() == ids[source][8 * index : 8 * index + 8].tolist()
            assert labels[row].tolist() == ids[source][8 * index + 1 : 8 * index + 9].tolist()
    inputs, _ = batches.validation(0, batches.validation_count)
    kept = [source[round(len(source) * 0.9) :] for source in ids]
    assert inputs.flatten().tolist() == [*kept[0][:24], *kept[1][:48]]
    assert batches.validation(2, 3)[0].tolist() == inputs[2:5].tolist()
