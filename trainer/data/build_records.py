"""Prepares a corpus of documents that are records: tokenises each once, into the files of a prepared corpus."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.build import SAMPLE_CHARACTERS_PER_ENTRY, make_durable, without_long_words
from bagualu.trainer.data.chat import BESIDE_TOKENIZERS, ChatTemplate
from bagualu.trainer.data.prepared import ANSWERS, SPLITS, STARTS, fingerprint, token_dtype
from bagualu.trainer.data.records import RecordSource, SourceRecord
from bagualu.trainer.data.request import CorpusRequest
from bagualu.trainer.data.split import NOTHING, hash_fraction
from bagualu.trainer.data.tokenizer import END_OF_FILE_TOKEN, Encoder, load_tokenizer, train_tokenizer
from bagualu.trainer.data.tokenizer_files import GivenTokenizer

KIND = "records"
"""`Corpus.split` of a corpus of which some documents are kept for validation."""
_START = struct.Struct("<q")
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

    template: ChatTemplate | None = None
    """Given for conversations, whose answers alone are trained on."""

    def documents(self) -> Iterator[tuple[SourceRecord, bool]]:
        """Yields each document, and whether it is for validation. Raises RecipeError."""
        for record in self.source.records():
            yield record, self.keeps(record)
        if (apart := self._apart) is not None:
            yield from ((record, True) for record in apart())

    @property
    def _apart(self) -> Callable[[], Iterator[SourceRecord]] | None:
        """Yields the documents of another source or split that are for validation; None if there is none, or none is kept."""
        if not self.request.keeps_validation:
            return None
        return self.held_out.records if self.held_out else self.source.held_out

    def keeps(self, record: SourceRecord) -> bool:
        """Returns whether this document of the source is for validation."""
        if not self.request.keeps_validation or self._apart is not None:
            return False
        return hash_fraction(record.name) < self.request.data.validation_fraction

    def texts(self) -> Iterator[tuple[str, bool]]:
        """Yields the text of each document that has any, and whether it is for validation. Raises RecipeError."""
        for record, held in self.documents():
            if text := record.text(self.request.data.text_field):
                yield text, held


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
        after = np.array(end, dtype).tobytes()
        encoded: Iterator[Encoded] = (Encoded(encode(text) + after, None, held) for text, held in corpus.texts())
    else:
        for name in ("tokenizer.json", *BESIDE_TOKENIZERS):
            path = given.path if name == "tokenizer.json" else given.path.parent / name
            if path.is_file():
                shutil.copyfile(path, folder / name)
        end = given.end
        encoded = _conversations(corpus, given, corpus.template, dtype) if corpus.template else _texts(corpus, given, dtype)
    counts = _write(folder, encoded, np.dtype(dtype).itemsize, corpus.template is not None)
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
        text = record.text(corpus.request.data.text_field)
        if hash_fraction("sample:" + record.name) >= share:
            continue
        if corpus.keeps(record):
            continue
        yield from without_long_words(text[:left])
        left -= len(text)
        if left <= 0:
            return


@dataclass(frozen=True)
class Encoded:
    """A document as the bytes of its tokens and, of a conversation, of whether each is to be predicted (1 or 0, uint16)."""

    tokens: bytes
    answers: bytes | None
    held: bool
    """Whether it is for validation."""


def _texts(corpus: RecordCorpus, given: GivenTokenizer, dtype: str) -> Iterator[Encoded]:
    """Yields the documents, each with the id that ends it. They are encoded several at once, by several threads."""
    after = np.array(given.end, dtype).tobytes()
    for portion in _portions(corpus.texts()):
        encodings = given.tokenizer.encode_batch_fast([text for text, _ in portion], add_special_tokens=False)
        for encoding, (_, held) in zip(encodings, portion, strict=True):
            yield Encoded(np.array(encoding.ids, dtype).tobytes() + after, None, held)


def _portions(texts: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Yields the texts in lists of about _AT_ONCE_CHARACTERS."""
    portion: list[tuple[str, bool]] = []
    characters = 0
    for text, held in texts:
        portion.append((text, held))
        characters += len(text)
        if characters >= _AT_ONCE_CHARACTERS:
            yield portion
            portion, characters = [], 0
    if portion:
        yield portion


def _conversations(corpus: RecordCorpus, given: GivenTokenizer, template: ChatTemplate, dtype: str) -> Iterator[Encoded]:
    """Yields the conversations, as the template writes them."""
    tokenizer = load_tokenizer(given.path, special_tokens=True)
    for record, held in corpus.documents():
        messages = record.fields.get(corpus.request.data.text_field)
        text, spans = template.conversation(messages, record.where)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        begins = np.array([begin for begin, _ in encoding.offsets], np.int64)
        answers = np.zeros(len(begins), np.uint16)
        for first, after in spans:
            answers[(begins >= first) & (begins < after)] = 1
        yield Encoded(np.array(encoding.ids, dtype).tobytes(), answers.tobytes(), held)


def _write(folder: Path, documents: Iterator[Encoded], item_bytes: int, answers: bool) -> list[int]:
    """Writes the documents; returns the numbers of those for training and for validation. Memory does not grow with them."""
    counts, ends = [0, 0], [0, 0]
    with ExitStack() as stack:
        tokens, starts = ([stack.enter_context(open(folder / name, "wb")) for name in names] for names in (SPLITS, STARTS))
        wanted = [stack.enter_context(open(folder / name, "wb")) for name in ANSWERS] if answers else []
        for stream in starts:
            stream.write(_START.pack(0))
        for document in documents:
            tokens[document.held].write(document.tokens)
            if document.answers is not None:
                wanted[document.held].write(document.answers)
            counts[document.held] += 1
            ends[document.held] += len(document.tokens) // item_bytes
            starts[document.held].write(_START.pack(ends[document.held]))
    return counts


def _require_documents(corpus: RecordCorpus, counts: list[int]) -> None:
    data = corpus.request.data
    if not sum(counts):
        raise RecipeError(f"data.source={data.source} holds no document with text in data.field={data.text_field}; give another")
    if 0 in counts[: 1 + corpus.request.keeps_validation]:
        empty, documents = ("validation", counts[0]) if counts[0] else ("training", counts[1])
        raise RecipeError(f"none of the {documents} documents of data.source={data.source} is for {empty}; give more documents, "
                          "another data.validation_fraction, data.validation=PATH, or train.validation_sequences=0")  # fmt: skip
