"""Text of any shape: how much of it trains and validates, what is read of it and what is advised where it is too small."""

import os
import re
import shutil
from pathlib import Path

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.launch import cli
from bagualu.trainer.data import build
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.data.tokenised import Corpus, show_data
from bagualu.trainer.recipe.compose import compose, save_recipe
from tests.trainer.data.conftest import words

VOCAB = 300


def corpus_of(source: Path, vocab: int = VOCAB, **changes: object) -> Corpus:
    settings = {"validation_fraction": 0.05, "sequence_length": 16, "cache": str(source.parent / "cache"), **changes}
    return prepare(DataConfig(source=str(source), **settings), vocab)


def text_bytes(corpus: Corpus) -> int:
    """Bytes of text that the tokens of both parts stand for."""
    return int(sum(corpus.token_bytes[tokens[:]].sum() for tokens in (corpus.train, corpus.validation)))


def files(folder: Path, **contents: str) -> Path:
    folder.mkdir()
    for name, text in contents.items():
        (folder / name).write_text(text, newline="")
    return folder


LONG = words(40_000, seed=1)
CHINESE = "".join(chr(0x4E00 + number * 7919 % 20000) for number in range(4_000))
SHAPES = {
    "two files of very unlike size": {"a": LONG, "b": words(40, seed=2)},
    "two files of very unlike size, the other way": {"b": LONG, "a": words(40, seed=2)},
    "two equal files": {"a": LONG[:90_000], "b": LONG[90_000:180_000]},
    "a large file among many small ones": {"large": LONG, **{f"s{n}": words(30, seed=n) for n in range(50)}},
    "one file of many lines": {"a": LONG},
    "one file without a line end": {"a": LONG.replace("\n", " ")},
    "one file whose line ends are at its beginning": {"a": "a\n\nb\n" + LONG.replace("\n", " ")},
    "one file without any white space": {"a": re.sub(r"\s", "", LONG)},
    "one file that ends in denser text": {"a": LONG * 3 + CHINESE},
    "one file that begins in denser text": {"a": CHINESE + LONG * 3},
    "two files, the smaller one denser": {"a": LONG * 3, "b": CHINESE},
}


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_parts_are_within_a_factor_of_two_of_their_share(tmp_path: Path, shape: str, fraction: float) -> None:
    source = files(tmp_path / "text", **SHAPES[shape])
    corpus = corpus_of(source, vocab=257 + 40, validation_fraction=fraction)
    train, validation = len(corpus.train), len(corpus.validation)
    assert fraction / 2 <= validation / (train + validation) <= fraction * 2
    assert (1 - fraction) / 2 <= train / (train + validation) <= (1 - fraction) * 2
    assert text_bytes(corpus) == sum(path.stat().st_size for path in source.iterdir())


def test_a_text_too_small_to_be_split_is_refused_and_what_is_advised_helps(tmp_path: Path) -> None:
    source = files(tmp_path / "text", a="abc")
    with pytest.raises(RecipeError, match=r"cannot be split .*; give more text, or train\.validation_sequences=0") as refused:
        corpus_of(source, vocab=257, sequence_length=1)
    assert "model.vocab" not in str(refused.value)
    config = DataConfig(source=str(source), sequence_length=1, cache=str(tmp_path / "cache"))
    assert len(prepare(config, 257, validation=False).train) == 4


def test_with_validation_off_all_of_the_text_trains(tmp_path: Path) -> None:
    source = files(tmp_path / "text", a=LONG, b=words(500, seed=2))
    config = DataConfig(source=str(source), sequence_length=16, cache=str(tmp_path / "cache"))
    corpus = prepare(config, VOCAB, validation=False)
    assert (len(corpus.validation), corpus.split) == (0, "none")
    assert text_bytes(corpus) == sum(path.stat().st_size for path in source.iterdir())
    assert show_data(corpus, "text") == f"data: text, {len(corpus.train):,} tokens to train on, none to validate with"
    kept = prepare(config, VOCAB)
    share = len(kept.validation) / (len(kept.train) + len(kept.validation))
    assert f"{len(kept.train):,} tokens to train on, {len(kept.validation):,} ({share:.1%}) to validate" in show_data(kept, "text")


def test_the_split_of_earlier_versions_can_be_kept(tmp_path: Path) -> None:
    """Whole files, whatever share that is, also with validation off; a lone file behind its last line end before the share."""
    source = files(tmp_path / "text", a=LONG, b=words(40, seed=2))
    config = DataConfig(source=str(source), sequence_length=16, cache=str(tmp_path / "cache"), split="files")
    corpora = [prepare(config, VOCAB, validation=on) for on in (True, False)]
    assert corpora[0].fingerprint == corpora[1].fingerprint
    sizes = {path.stat().st_size for path in source.iterdir()}
    assert corpora[0].token_bytes[corpora[0].validation[:]].sum() in sizes


def test_a_whole_file_split_that_meets_its_share_is_kept(folder: Path) -> None:
    """So runs of earlier versions go on as they are."""
    whole, now = (corpus_of(folder, split=split, validation_fraction=0.25) for split in ("files", "share"))
    assert (whole.fingerprint, whole.split) == (now.fingerprint, "files")


# What is read


def test_linked_folders_are_read_once_each_and_circles_end(tmp_path: Path) -> None:
    source, outside = files(tmp_path / "text", a=LONG[:30_000]), files(tmp_path / "outside", b=LONG[30_000:60_000])
    (source / "inner").mkdir()
    (source / "inner" / "c").write_text(LONG[60_000:90_000])
    (source / "link").symlink_to(outside)
    expected = sum(path.stat().st_size for path in (source / "a", source / "inner" / "c", outside / "b"))
    assert text_bytes(corpus_of(source)) == expected
    (source / "loop").symlink_to(".")
    (source / "inner" / "up").symlink_to("..")
    (source / "0").symlink_to("inner")
    (outside / "back").symlink_to(source)
    (source / "nothing").symlink_to("nowhere")
    (source / "itself").symlink_to("itself")
    (source / "again").symlink_to("a")
    (source / "twice").symlink_to(outside / "b")
    assert text_bytes(corpus_of(source)) == expected
    alone = files(tmp_path / "alone", d=LONG[90_000:120_000])
    (source / "one").symlink_to(alone / "d")
    (source / "two").symlink_to(alone / "d")
    expected += (alone / "d").stat().st_size
    assert text_bytes(corpus_of(source)) == expected
    (tmp_path / "via").symlink_to(source)
    assert text_bytes(corpus_of(tmp_path / "via")) == expected


def a_run(folder: Path) -> Path:
    save_recipe(compose([f"run.dir={folder}"]))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "logs").mkdir()
    (folder / "logs" / "rank-0.log").write_text("step 1")
    return folder


def test_run_directories_are_never_text(tmp_path: Path) -> None:
    source = files(tmp_path / "text", a=LONG[:30_000])
    expected = text_bytes(corpus_of(source))
    fingerprint = corpus_of(source).fingerprint
    outside = a_run(tmp_path / "elsewhere" / "old")
    a_run(source / "runs" / "deep" / "er")
    bare = a_run(source / "bare")  # without its recipe
    (bare / "config.yaml").unlink()
    (bare / "ledger.jsonl").write_text("{}\n")
    (source / "linked").symlink_to(outside)
    (source / "logs").symlink_to(outside / "logs")
    (source / "file").symlink_to(outside / "config.yaml")
    assert text_bytes(corpus_of(source)) == expected
    corpus_of(source, cache=str(source / "older"))
    own = source / "own"
    own.mkdir()
    (own / "notes").write_text("not yet a run to look at")
    config = DataConfig(source=str(source), sequence_length=16, cache=str(source / "cache"))
    assert prepare(config, VOCAB, run_dir=str(own)).fingerprint == fingerprint
    assert prepare(config, VOCAB, run_dir=str(own)).fingerprint == fingerprint, (
        "the cache that was made below the source is no text"
    )
    with pytest.raises(RecipeError, match=r"is the folder of a run .*; give the folder of the text, or another run\.dir"):
        prepare(config, VOCAB, run_dir=str(source))


def test_the_folder_of_a_job_that_waits_to_start_is_never_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = files(tmp_path / "text", a=LONG[:30_000])
    expected = text_bytes(corpus_of(source))
    monkeypatch.setattr(shutil, "which", lambda name: None)  # nothing is submitted
    assert cli.main(["slurm", f"run.dir={source}/run"]) == 0
    assert {path.name for path in (source / "run").iterdir()} == {"job.sbatch", "logs"}
    assert text_bytes(corpus_of(source)) == expected


def test_a_folder_that_only_looks_like_a_run_is_text(tmp_path: Path) -> None:
    source = files(tmp_path / "text", a=LONG[:30_000])
    files(
        source / "b",
        **{
            "config.yaml": "model: x\nrun: y\n",
            "job.sbatch": "#!/bin/bash\ntrue\n",
            "metrics.jsonl": "{}\n",
            "summary.json": "{}\n",
        },
    )
    expected = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    assert text_bytes(corpus_of(source)) == expected


@pytest.mark.parametrize("inside", [b"caf\xe9.txt", b"caf\xe9/a.txt"])
def test_a_name_that_is_not_utf8_is_named_in_one_printable_line(tmp_path: Path, inside: bytes) -> None:
    source = files(tmp_path / "text", a=LONG[:30_000])
    path = os.path.join(os.fsencode(source), inside)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(b"text")
    with pytest.raises(RecipeError, match=r"text/caf\\xe9(\.txt)? has a name that is not UTF-8; rename it or take it out") as error:
        corpus_of(source)
    assert str(error.value).isprintable()


def test_a_file_whose_name_has_a_line_end_is_shown_in_one_line(tmp_path: Path) -> None:
    source = files(tmp_path / "text", a=LONG[:30_000])
    (source / "b\n\x1b[1m").write_bytes(b"abc\xff")
    with pytest.raises(RecipeError, match=r"b\\n\\x1b\[1m is not UTF-8 text \(byte 3\); convert") as error:
        corpus_of(source)
    assert str(error.value).isprintable()


# What is advised


def typed(problem: str) -> dict[str, int]:
    """The keys and values that a refusal says to give."""
    return {key: int(value) for key, value in re.findall(r"([a-z.]+_?[a-z]+)=(\d+)", problem.partition("give ")[2])}


TEXTS = {
    "words": words(1_200, seed=3),
    "a short one": words(120, seed=3),
    "repeats": "ab cd " * 3_000,
    "no words": "abcdefghij" * 10_000,
    "other letters": CHINESE[:2_000],
}


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("vocab", [10_000, 10**6])
def test_the_advice_on_a_vocabulary_too_large_holds_at_once(tmp_path: Path, text: str, vocab: int, multiple: int) -> None:
    source = files(tmp_path / "text", a=TEXTS[text], b=TEXTS[text][:300])
    config = DataConfig(source=str(source), sequence_length=256, cache=str(tmp_path / "cache"))
    enough = text in ("words", "repeats")  # to be split
    request = {"length_multiple": multiple, "validation": enough}
    with pytest.raises(RecipeError, match=r"yields only \d+ tokens; give model\.vocab=\d+") as refused:
        prepare(config, vocab, **request)
    advice = typed(str(refused.value))
    config.sequence_length = advice.get("data.sequence_length", config.sequence_length)
    corpus = prepare(config, advice["model.vocab"], **request)
    assert (config.sequence_length % multiple, corpus.vocab) == (0, advice["model.vocab"])


def test_it_holds_where_a_smaller_vocabulary_is_trained_on_less_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SAMPLE_CHARACTERS_PER_ENTRY", 4)
    source = files(tmp_path / "text", a=words(5_000, seed=3))
    config = DataConfig(source=str(source), sequence_length=16, cache=str(tmp_path / "cache"))
    with pytest.raises(RecipeError, match=r"yields only \d+ tokens; give model\.vocab=\d+") as refused:
        prepare(config, 10_000)
    yielded = re.search(r"yields only (\d+)", str(refused.value))
    advised = typed(str(refused.value))["model.vocab"]
    assert yielded is not None
    assert advised < int(yielded[1]), "trained on less, it would yield fewer again"
    assert prepare(config, advised).vocab == advised


def test_the_advice_on_a_sequence_too_long_holds_for_both_parts(tmp_path: Path) -> None:
    source = files(tmp_path / "text", a=words(1_000, seed=3))
    config = DataConfig(source=str(source), sequence_length=10**6, cache=str(tmp_path / "cache"))
    with pytest.raises(RecipeError, match=r"validation split .* give data\.sequence_length=\d+ or more text") as refused:
        prepare(config, VOCAB, length_multiple=8)
    config.sequence_length = typed(str(refused.value))["data.sequence_length"]
    assert config.sequence_length % 8 == 0
    prepare(config, VOCAB, length_multiple=8)


def test_the_advice_on_a_vocabulary_too_small_holds_at_once(tmp_path: Path) -> None:
    source = files(tmp_path / "text", a=LONG)
    config = DataConfig(source=str(source), sequence_length=16, cache=str(tmp_path / "cache"))
    with pytest.raises(RecipeError, match=r"model\.vocab=100 cannot hold every byte .* give model\.vocab=\d+ or more") as refused:
        prepare(config, 100)
    prepare(config, typed(str(refused.value))["model.vocab"])
