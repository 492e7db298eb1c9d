"""Prepares a corpus: splits the text, trains the tokenizer on the training part, and writes the tokens of both parts.

The text is read in pieces, so memory use does not grow with the text.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.config import SMALLEST_VOCAB, STDLIB
from bagualu.trainer.data.listing import TextFile
from bagualu.trainer.data.prepared import SPLITS, fingerprint, token_dtype
from bagualu.trainer.data.reading import Part, cut, is_utf8, whole
from bagualu.trainer.data.request import CorpusRequest
from bagualu.trainer.data.split import NOTHING, TextSplit, by_files, by_share, hash_fraction, meets
from bagualu.trainer.data.tokenizer import END_OF_FILE_TOKEN, Encoder, train_tokenizer

SAMPLE_CHARACTERS_PER_ENTRY = 750
"""Characters of text that the tokenizer is trained on, per entry of its vocabulary. More would take seconds and hardly change
it."""
_LONG_WORD = re.compile(r"\w{4096}|[^\w\s]{4096}|\s{4096}")
_TRIAL = "trial"
_TRIES = 4
"""How many splits are tried until the tokens of both parts meet the requested share."""


@dataclass(frozen=True)
class Document:
    """A part of a file, to be followed by one end-of-file token, and whether it is kept for validation."""

    part: Part
    validation: bool


class VocabularyTooLargeError(Exception):
    """The training text yields a vocabulary of only `size` entries, fewer than requested."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def build(folder: Path, scratch: Path, request: CorpusRequest, files: Sequence[TextFile]) -> None:
    """Writes a whole corpus durably into `folder`. `scratch` is a folder for files that are not needed afterwards.

    Raises RecipeError, with the values to give instead, if the text cannot be read or split or is too small for the vocabulary.
    """
    try:
        kind = _write(folder, request, files)
    except VocabularyTooLargeError as error:
        raise RecipeError(_vocabulary_advice(scratch, request, files, error.size)) from error
    (folder / "corpus.json").write_text(json.dumps({"fingerprint": fingerprint(folder), "split": kind}))
    for path in [*folder.iterdir(), folder]:
        make_durable(path)


def documents(files: Sequence[TextFile], split: TextSplit, source: str) -> list[Document]:
    """Returns the documents into which `split` divides `files`, in the order of the files; the file that is cut gives two. Raises
    RecipeError for a file that cannot be read.

    Files of the standard library that are not UTF-8 are skipped.
    """
    result = []
    for file in files:
        if source == STDLIB and not is_utf8(file):
            continue
        if file.name == split.cut:
            training, validation = cut(file, split.training_share, anywhere=split.kind == "files")
            result += [Document(training, False), Document(validation, True)]
        else:
            result.append(Document(whole(file), file.name in split.validation))
    return result


def _write(folder: Path, request: CorpusRequest, files: Sequence[TextFile]) -> str:
    """Writes the tokenizer and the tokens into `folder` and returns the kind of split. Raises RecipeError,
    VocabularyTooLargeError."""
    data, counts = request.data, (0, 0)
    if not request.keeps_validation:
        _write_tokens(folder, documents(files, NOTHING, data.source), request.vocab)
        return NOTHING.kind
    wanted = share = data.validation_fraction
    for attempt in range(_TRIES):
        split = by_share(files, share) if attempt else by_files(files, wanted)
        text = documents(files, split, data.source)
        sizes = [sum(document.part.size_bytes for document in text if document.validation == kept) for kept in (False, True)]
        if 0 in sizes or (attempt == 0 and data.split != "files" and not meets(sizes[1], sum(sizes), wanted)):
            continue
        counts = _write_tokens(folder, text, request.vocab)
        if data.split == "files" or meets(counts[1], sum(counts), wanted):
            return split.kind
        if attempt:  # the parts differ in tokens per byte: correct the share of bytes for that
            odds = share / (1 - share) * (wanted / (1 - wanted)) / (counts[1] / counts[0])
            share = odds / (1 + odds)
    raise RecipeError(f"the text of data.source={data.source} cannot be split so that data.validation_fraction={wanted} of its "
                      "tokens are kept for validation" + (f" ({counts[1]} of {sum(counts)} would be)" if any(counts) else "")
                      + "; give more text, or train.validation_sequences=0, which keeps nothing for validation")  # fmt: skip


def _write_tokens(folder: Path, text: Sequence[Document], vocab: int) -> tuple[int, int]:
    """Trains the tokenizer, writes it and all tokens to `folder`, and returns the numbers of training and validation tokens. Raises
    VocabularyTooLargeError, RecipeError."""
    training = [document.part for document in text if not document.validation]
    tokenizer = train_tokenizer(_sample(training, vocab * SAMPLE_CHARACTERS_PER_ENTRY), vocab)
    if tokenizer.get_vocab_size() < vocab:
        raise VocabularyTooLargeError(tokenizer.get_vocab_size())
    tokenizer.save(str(folder / "tokenizer.json"))
    dtype = token_dtype(vocab)
    encoder = Encoder(tokenizer, dtype)
    with open(folder / SPLITS[0], "wb") as train, open(folder / SPLITS[1], "wb") as validation:
        for document in text:
            _write_part(validation if document.validation else train, document.part, encoder, dtype)
    return token_counts(folder, vocab)


def _write_part(stream: BinaryIO, part: Part, encoder: Encoder, dtype: str) -> None:
    for piece in part.pieces():
        stream.write(encoder.encode(piece))
    stream.write(np.array(END_OF_FILE_TOKEN, dtype).tobytes())


def _sample(parts: Sequence[Part], most_characters: int) -> Iterator[str]:
    """Yields text of the parts, in the order of the hashes of their files' names, at most `most_characters` in all."""
    for part in sorted(parts, key=lambda part: hash_fraction("sample:" + part.file.name)):
        for piece in part.pieces():
            if most_characters <= 0:
                return
            yield from without_long_words(piece[:most_characters])
            most_characters -= len(piece)


def without_long_words(text: str) -> Iterator[str]:
    """Yields `text` in parts, cut inside extremely long words: the time to train the tokenizer is quadratic in their length."""
    start = 0
    for match in _LONG_WORD.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def _vocabulary_advice(scratch: Path, request: CorpusRequest, files: Sequence[TextFile], size: int) -> str:
    """Returns the message for a text that yields only `size` vocabulary entries, with the value of model.vocab to give instead, or
    the advice to give more text if no value helps."""
    problem = f"the text of data.source={request.data.source} yields only {size} tokens"
    vocab = _largest_vocab(scratch, request, files, size)
    longest = request.longest_sequence(token_counts(scratch / _TRIAL, vocab))
    while longest < 1 and vocab > SMALLEST_VOCAB:  # its entries are so long that too few tokens remain
        vocab = _largest_vocab(scratch, request, files, max(vocab // 2, SMALLEST_VOCAB))
        longest = request.longest_sequence(token_counts(scratch / _TRIAL, vocab))
    if longest < 1:
        return f"{problem}, and is shorter than a sequence; give more text"
    shorter = f" data.sequence_length={longest}" if longest < request.data.sequence_length else ""
    return f"{problem}; give model.vocab={vocab}{shorter}, or more text"


def _largest_vocab(scratch: Path, request: CorpusRequest, files: Sequence[TextFile], vocab: int) -> int:
    """Returns the largest vocabulary up to `vocab` for which the text suffices, by preparing it in the trial folder of `scratch`.

    A smaller vocabulary is trained on less text, which may again yield fewer entries. The smallest vocabulary needs no text.
    """
    (scratch / _TRIAL).mkdir(exist_ok=True)
    while True:
        try:
            _write(scratch / _TRIAL, replace(request, vocab=vocab), files)
            return vocab
        except VocabularyTooLargeError as error:
            vocab = error.size


def token_counts(folder: Path, vocab: int) -> tuple[int, int]:
    """Returns the numbers of training and validation tokens in `folder`."""
    item = np.dtype(token_dtype(vocab)).itemsize
    train, validation = ((folder / name).stat().st_size // item for name in SPLITS)
    return train, validation


def make_durable(path: Path) -> None:
    """Returns when what `path`, a file or folder, holds is on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
