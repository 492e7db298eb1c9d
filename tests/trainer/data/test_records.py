"""Records: each document becomes the same tokens wherever it comes from, and what is wrong with a record is said with its place."""

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data import build_records
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.corpus import check_source, prepare
from bagualu.trainer.data.listing import SourceError
from bagualu.trainer.data.tokenised import Corpus
from bagualu.trainer.data.tokenizer import load_tokenizer
from tests.trainer.data.conftest import words

TEXTS = [words(60, seed) for seed in range(50)] + ["", "ends with no line"]
VOCAB = 320


def write(folder: Path, kind: str, texts: list[str] = TEXTS) -> Path:
    """Writes the documents; returns the data.source."""
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    lines = "".join(json.dumps(row, ensure_ascii=row["id"] == 1) + "\n\n" for row in rows)  # with blank lines
    path = folder / {"jsonl": "a.jsonl", "gzip": "a.jsonl.gz", "parquet": "a.parquet"}.get(kind, "saved")
    if kind == "jsonl":
        path.write_text(lines, encoding="utf-8")
    elif kind == "gzip":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        import datasets

        dataset = datasets.Dataset.from_list(rows)
        if kind == "parquet":
            dataset.to_parquet(str(path))
        elif kind == "saved":
            dataset.save_to_disk(str(path))
        else:
            datasets.DatasetDict({"train": dataset, "validation": dataset.select(range(3))}).save_to_disk(str(path))
    return path


def config(source: Path | str, folder: Path, **changes: Any) -> DataConfig:
    fixed = {"source": str(source), "cache": str(folder / "cache"), "sequence_length": 8, "validation_fraction": 0.2}
    return DataConfig(**{**fixed, **changes})


def make_tokenizer(folder: Path) -> Path:
    """A small tokenizer made elsewhere, with a special token, in a folder with its configuration."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<stop>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    (folder / "made").mkdir(exist_ok=True)
    tokenizer.save(str(folder / "made/tokenizer.json"))
    (folder / "made/tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    return folder / "made"


def documents_of(corpus: Corpus) -> list[str]:
    """The documents of both splits, decoded, sorted."""
    assert corpus.tokenizer_path is not None
    assert corpus.documents is not None
    end, tokenizer = corpus.documents[0].end, load_tokenizer(corpus.tokenizer_path)  # type: ignore[attr-defined]
    texts = []
    for tokens in (corpus.train[:], corpus.validation[:]):
        assert tokens[-1] == end
        for document in np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]:
            texts.append(tokenizer.decode(document[:-1].tolist()))
    return sorted(texts)


KINDS = ["jsonl", "gzip", "parquet", "saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_documents_with_a_tokenizer_of_either_sort(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path, kind)
    expected = sorted(text for text in TEXTS if text)
    trained = prepare(config(source, tmp_path), VOCAB)
    assert documents_of(trained) == expected
    assert trained.split == "records"
    assert trained.token_bytes[trained.train[:]].sum() + trained.token_bytes[trained.validation[:]].sum() == sum(
        len(text.encode()) for text in expected
    )
    given = prepare(config(source, tmp_path, tokenizer=str(make_tokenizer(tmp_path))), VOCAB)
    assert documents_of(given) == expected
    assert given.train[:][-1] == 1
    assert given.token_bytes.shape == (VOCAB,)
    assert given.token_bytes[given.train[:]].sum() + given.token_bytes[given.validation[:]].sum() == sum(
        len(text.encode()) for text in expected
    )
    assert 2 <= (given.validation[:] == 1).sum() <= 20


def test_records_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = config(write(tmp_path, "jsonl"), tmp_path)
    first = prepare(data, VOCAB)
    monkeypatch.setattr("bagualu.trainer.data.text_corpus.build_records", None)
    assert prepare(data, VOCAB).fingerprint == first.fingerprint
    (tmp_path / "a.jsonl").write_text('{"text": "more"}\n' * 9)
    with pytest.raises(TypeError):
        prepare(data, VOCAB)


def test_text_with_a_tokenizer_is_a_document_a_file(folder: Path, tmp_path: Path) -> None:
    corpus = prepare(config(folder, tmp_path, tokenizer=str(make_tokenizer(tmp_path) / "tokenizer.json")), VOCAB)
    assert documents_of(corpus) == sorted(path.read_text() for path in folder.rglob("*.txt"))


def test_a_saved_split_or_another_source_is_for_validation(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    source = write(tmp_path / "a", "dict")
    tokenizer = str(make_tokenizer(tmp_path))
    kept = prepare(config(source, tmp_path, tokenizer=tokenizer), VOCAB)
    assert ((kept.train[:] == 1).sum(), (kept.validation[:] == 1).sum()) == (len(TEXTS) - 1, 3)
    other = write(tmp_path, "jsonl", TEXTS[:5])
    kept = prepare(config(source, tmp_path, tokenizer=tokenizer, validation=str(other)), VOCAB)
    assert (kept.validation[:] == 1).sum() == 5
    alone = prepare(config(source, tmp_path, tokenizer=tokenizer), VOCAB, validation=False)
    assert ((alone.train[:] == 1).sum(), len(alone.validation), alone.split) == (len(TEXTS) - 1, 0, "none")


def test_the_fingerprint_depends_on_the_tokens_alone(tmp_path: Path) -> None:
    tokenizer = str(make_tokenizer(tmp_path))
    first = prepare(config(write(tmp_path, "jsonl"), tmp_path, tokenizer=tokenizer), VOCAB)
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "moved/a.jsonl")
    assert prepare(config(tmp_path / "moved", tmp_path, tokenizer=tokenizer), VOCAB).fingerprint == first.fingerprint


LINES = ['{"text": "one"}', '{"text": "two"}', '{"text": "three"}']
BAD: list[tuple[list[str], str]] = [
    ([LINES[0], '{"text": "tw'], r"a\.jsonl, line 2 is broken JSON \(Unterminated string.*\); correct or remove it"),
    ([LINES[0], "", "[1, 2]"], r"a\.jsonl, line 3 is no JSON object"),
    ([LINES[0], '{"txt": "two", "id": 3}'], r"a\.jsonl, line 2 has no field text; give data\.field as one of txt, id"),
    ([LINES[0], '{"text": ["two"]}'], r"a\.jsonl, line 2: field text is no text but list"),
    ([LINES[0], '{"text": "tw\udcff"}'], r"a\.jsonl, line 2 is not UTF-8 \(byte 12\)"),
    (['{"text": ""}'], r"holds no document with text in data\.field=text"),
    ([LINES[0]], r"none of the 1 documents of data\.source=.* is for validation; give more documents"),
]


@pytest.mark.parametrize(("lines", "message"), BAD)
def test_a_bad_record_is_refused_with_its_place(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    with pytest.raises(RecipeError, match=message) as error:
        prepare(config(path, tmp_path, tokenizer=str(make_tokenizer(tmp_path))), VOCAB)
    assert "\n" not in str(error.value)


def _cut(path: Path) -> None:
    os.truncate(path, 300)


@pytest.mark.parametrize(("kind", "damage", "message"), [
    ("gzip", _cut, r"a\.jsonl\.gz cannot be read \(Compressed file ended"),
    ("parquet", _cut, r"a\.parquet cannot be read \(.*\); put it right"),
    ("saved", lambda path: (path / "state.json").write_text("{}"), r"saved cannot be loaded \(.*\); save it again"),
])  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path: Path, kind: str, damage: Callable[[Path], Any], message: str) -> None:
    source = write(tmp_path, kind)
    damage(source)
    given = "saved" if kind == "saved" else None
    with pytest.raises(RecipeError, match=message):
        prepare(config(source, tmp_path, format=given), VOCAB)


def test_keys_that_do_not_fit_records_are_refused_before_a_run(tmp_path: Path) -> None:
    source, made = write(tmp_path, "jsonl"), make_tokenizer(tmp_path)
    for changes, vocab, message in (
        ({"tokenizer": str(made)}, 299, r"has 300 tokens, but model\.vocab=299; give model\.vocab=300 or more"),
        ({"tokenizer": str(made), "end_token": 400}, 320, r"data\.end_token=400 is not in model\.vocab=320"),
        ({"tokenizer": str(tmp_path / "none")}, 320, r"data\.tokenizer=.*none cannot be read"),
        ({"token_dtype": "uint16"}, 320, r"data\.token_dtype=uint16 is for files of token ids"),
        ({"end_token": 3}, 320, r"data\.end_token=3 is for text with data\.tokenizer"),
        ({"field": "body"}, 320, r"line 1 has no field body; give data\.field as one of id, text"),
        ({}, 200, r"model\.vocab=200 cannot hold every byte"),
    ):
        with pytest.raises(RecipeError, match=message):
            check_source(config(source, tmp_path, **changes), vocab)
    (made / "tokenizer_config.json").unlink()
    with pytest.raises(RecipeError, match=r"does not say which token ends a document; give data\.end_token=ID"):
        check_source(config(source, tmp_path, tokenizer=str(made)), 320)
    check_source(config(source, tmp_path, tokenizer=str(made), end_token=0), 320)
    with pytest.raises(RecipeError, match=r"yields only .* tokens; give model\.vocab="):
        prepare(config(write(tmp_path, "jsonl", TEXTS[:30]), tmp_path), 5000)


def test_a_name_on_the_hub_needs_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fails)
    with pytest.raises(SourceError, match=r"source=owner/name cannot be opened on the Hugging Face hub \(no route to host\); see"):
        check_source(config("owner/name", tmp_path, format="hub"), VOCAB)


def test_a_dataset_of_the_hub_is_streamed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def streamed(name: str, subset: str | None, streaming: bool) -> Any:
        asked.append((name, subset, streaming))
        rows = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
        return datasets.IterableDatasetDict(
            {"train": rows.to_iterable_dataset(), "test": rows.select(range(4)).to_iterable_dataset()}
        )

    monkeypatch.setattr(datasets, "load_dataset", streamed)
    data = config("owner/name:part", tmp_path, format="hub", tokenizer=str(make_tokenizer(tmp_path)))
    corpus = prepare(data, VOCAB)
    assert documents_of(corpus) == sorted([text for text in TEXTS if text] + TEXTS[:4])
    check_source(data, VOCAB)
    prepare(data, VOCAB)
    assert asked == [("owner/name", "part", True)]


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path: Path) -> None:
    one = build_records.Encoded(b"\1\0\2\0", None, False)
    peaks = []
    for count in (1_000, 50_000):
        tracemalloc.start()
        counts = build_records._write(tmp_path, (one for _ in range(count)), 2, answers=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert counts == [count, 0]
        assert np.fromfile(tmp_path / "train.starts", np.int64).tolist() == list(range(0, 2 * count + 1, 2))
        assert np.fromfile(tmp_path / "validation.starts", np.int64).tolist() == [0]
    assert peaks[1] < peaks[0] + 2**16
