"""Prepares a corpus of documents that are records: tokenises each once, into the files of a prepared corpus."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.build import SAMPLE_CHARACTERS_PER_ENTRY, make_durable, without_long_words
from bagualu.trainer.data.prepared import SPLITS, fingerprint, token_dtype
from bagualu.trainer.data.records import RecordSource, SourceRecord
from bagualu.trainer.data.request import CorpusRequest
from bagualu.trainer.data.split import NOTHING, hash_fraction
from bagualu.trainer.data.tokenizer import END_OF_FILE_TOKEN, Encoder, train_tokenizer
from bagualu.trainer.data.tokenizer_files import GivenTokenizer

KIND = "records"
"""`Corpus.split` of a corpus of which some documents are kept for validation."""
_AT_ONCE_CHARACTERS = 2**22
_SAMPLED = 1.3
"""How many times as much text is looked at for the tokenizer's sample as it takes, since documents differ in length."""


@dataclass(frozen=True)
class RecordCorpus:
    """What a corpus of records is made of. `held_out`: documents for validation; None: a share of `source`."""

    source: RecordSource
    held_out: RecordSource | None
    request: CorpusRequest
    given: GivenTokenizer | None
    """None: a tokenizer is trained."""

    def documents(self) -> Iterator[tuple[str, bool]]:
        """Yields the text of each document that has any, and whether it is for validation. Raises RecipeError."""
        keep, fraction, field = self.request.keeps_validation, self.request.data.validation_fraction, self.request.data.field
        apart = None if not keep else self.held_out.records if self.held_out else self.source.held_out
        for record in self.source.records():
            if text := record.text(field):
                yield text, keep and apart is None and _is_kept(record, fraction)
        if apart is not None:
            for record in apart():
                if text := record.text(field):
                    yield text, True


def _is_kept(record: SourceRecord, fraction: float) -> bool:
    return hash_fraction(record.name) < fraction


def build_records(folder: Path, corpus: RecordCorpus) -> None:
    """Writes the whole corpus durably into `folder`. Raises RecipeError, with what to do, for documents that cannot be read, and if
    there are none for one of the splits."""
    request, given = corpus.request, corpus.given
    dtype = token_dtype(request.vocab)
    if given is None:
        tokenizer = train_tokenizer(_sample(corpus), request.vocab)
        if (size := tokenizer.get_vocab_size()) < request.vocab:
            raise RecipeError(f"the text of data.source={request.data.source} yields only {size} tokens; give model.vocab={size} "
                              "or less, a data.tokenizer, or more text")  # fmt: skip
        tokenizer.save(str(folder / "tokenizer.json"))
        encode, end = Encoder(tokenizer, dtype).encode, END_OF_FILE_TOKEN
        counts = _write(folder, ((encode(text), held) for text, held in corpus.documents()), end, dtype)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = given.path if name == "tokenizer.json" else given.path.parent / name
            if path.is_file():
                shutil.copyfile(path, folder / name)
        end = given.end
        counts = _write(folder, _encoded(corpus.documents(), given, dtype), end, dtype)
    _require_documents(corpus, counts)
    about = {"fingerprint": fingerprint(folder), "split": KIND if request.keeps_validation else NOTHING.kind,
             "end": end, "given": given is not None}  # fmt: skip
    (folder / "corpus.json").write_text(json.dumps(about))
    for path in [*folder.iterdir(), folder]:
        make_durable(path)


def _sample(corpus: RecordCorpus) -> Iterator[str]:
    """Yields text for training: of documents chosen by a hash, from the whole source if its size is known, at most as much as the
    tokenizer needs."""
    left = corpus.request.vocab * SAMPLE_CHARACTERS_PER_ENTRY
    size = corpus.source.size_bytes
    share = 1.0 if not size else min(1.0, _SAMPLED * left / size)
    for record in corpus.source.records():
        text = record.text(corpus.request.data.field)
        if hash_fraction("sample:" + record.name) >= share:
            continue
        if corpus.request.keeps_validation and _is_kept(record, corpus.request.data.validation_fraction):
            continue
        yield from without_long_words(text[:left])
        left -= len(text)
        if left <= 0:
            return


def _encoded(documents: Iterator[tuple[str, bool]], given: GivenTokenizer, dtype: str) -> Iterator[tuple[bytes, bool]]:
    """Yields the tokens of each document as bytes. Documents are encoded several at once, by several threads."""
    waiting: list[tuple[str, bool]] = []
    characters = 0

    def encoded() -> Iterator[tuple[bytes, bool]]:
        encodings = given.tokenizer.encode_batch_fast([text for text, _ in waiting], add_special_tokens=False)
        for encoding, (_, held) in zip(encodings, waiting, strict=True):
            yield np.array(encoding.ids, dtype).tobytes(), held

    for text, held in documents:
        waiting.append((text, held))
        characters += len(text)
        if characters >= _AT_ONCE_CHARACTERS:
            yield from encoded()
            waiting.clear()
            characters = 0
    yield from encoded()


def _write(folder: Path, documents: Iterator[tuple[bytes, bool]], end: int, dtype: str) -> list[int]:
    """Writes the documents, each with the id `end` after it; returns the numbers of those for training and for validation."""
    after, counts = np.array(end, dtype).tobytes(), [0, 0]
    with open(folder / SPLITS[0], "wb") as train, open(folder / SPLITS[1], "wb") as validation:
        streams: tuple[BinaryIO, BinaryIO] = train, validation
        for tokens, held in documents:
            streams[held].write(tokens)
            streams[held].write(after)
            counts[held] += 1
    return counts


def _require_documents(corpus: RecordCorpus, counts: list[int]) -> None:
    data = corpus.request.data
    if not sum(counts):
        raise RecipeError(f"data.source={data.source} holds no document with text in data.field={data.field}; give another")
    if 0 in counts[: 1 + corpus.request.keeps_validation]:
        empty, documents = ("validation", counts[0]) if counts[0] else ("training", counts[1])
        raise RecipeError(f"none of the {documents} documents of data.source={data.source} is for {empty}; give more documents, "
                          "another data.validation_fraction, data.validation=PATH, or train.validation_sequences=0")  # fmt: skip
