"""Corpora of text and of records: which there is in the cache, and how each is written.

The KEY of a corpus is a hash of what it is made from: names, sizes and modification times of the files, vocabulary, tokenizer and
split.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.build import build
from bagualu.trainer.data.build_records import RecordCorpus, build_records
from bagualu.trainer.data.chat import BESIDE_TOKENIZERS, ChatTemplate
from bagualu.trainer.data.config import CHAT, STDLIB, DataConfig, require_vocab
from bagualu.trainer.data.corpus_cache import Write
from bagualu.trainer.data.formats import OF_TOKENS, format_of
from bagualu.trainer.data.listing import TextFile
from bagualu.trainer.data.records import OF_RECORDS, made_from, open_records
from bagualu.trainer.data.request import CorpusRequest
from bagualu.trainer.data.sources import find_files
from bagualu.trainer.data.tokenizer_files import open_tokenizer

FORMAT = 5
"""A number in the KEY of a corpus. Raise it when what is stored changes."""


def of_text(request: CorpusRequest, apart: Sequence[str]) -> tuple[str, Write]:
    """Returns the KEY of the corpus of text whose tokenizer is trained on it, and the function that writes it."""
    require_vocab(request.vocab)
    require_text_keys(request.data)
    files = find_files(request.data.source, apart)

    def write(folder: Path, scratch: Path) -> None:
        build(folder, scratch, request, files)

    return _key(request, files), write


def of_records(request: CorpusRequest, kind: str, apart: Sequence[str]) -> tuple[str, Write]:
    """Returns the KEY of the corpus of a source of records, or of text with data.tokenizer, and the function that writes it."""
    data, keep = request.data, request.keeps_validation
    _require_keys_of_records(data)
    chat = kind == CHAT
    if chat:
        data.require_chat()
    end = data.end_token if data.end_token is not None or not chat else 0  # the template ends conversations
    given = None if data.tokenizer is None else open_tokenizer(data.tokenizer, end, request.vocab)
    if given is None:
        require_vocab(request.vocab)
    template = ChatTemplate(given.path) if chat and given is not None else None
    sources = [(data.source, reader_of(data.source, kind, apart))]
    if data.validation is not None and keep:
        held_out = _kind_of_records(data.validation, data.format, apart)
        sources.append((data.validation, reader_of(data.validation, held_out, apart)))
    tokens = None if given is None else [*map(_digest, [given.path, *_beside(given.path)]), given.end]
    listings = [made_from(source, of, apart) for source, of in sources]
    made = json.dumps([FORMAT, kind, listings, data.text_field, tokens, request.vocab, keep and data.validation_fraction])

    def write(folder: Path, scratch: Path) -> None:
        source, *others = (open_records(source, of, data.text_field, apart) for source, of in sources)
        build_records(folder, RecordCorpus(source, others[0] if others else None, request, given, template))

    return hashlib.blake2b(made.encode(), digest_size=16).hexdigest(), write


def reader_of(source: str, kind: str, apart: Sequence[str]) -> str:
    """Returns the format of the files of a source: `kind`, or that of the records in which conversations lie. Raises
    RecipeError."""
    if kind != CHAT:
        return kind
    found = format_of(source, None, apart)
    if found not in OF_RECORDS:
        raise RecipeError(f"data.source={source} is no file of records, in which data.format=chat finds conversations; give JSON "
                          "lines (.jsonl), Parquet or a saved dataset")  # fmt: skip
    return found


def _beside(tokenizer: Path) -> list[Path]:
    """Returns the files beside a tokenizer that are stored with a corpus."""
    return [path for name in BESIDE_TOKENIZERS if (path := tokenizer.parent / name).is_file()]


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes()).hexdigest()


def _kind_of_records(source: str, given: str | None, apart: Sequence[str]) -> str:
    """Returns the format of data.validation. Raises RecipeError if it holds token ids."""
    kind = format_of(source, given, apart)
    if kind in OF_TOKENS:
        raise RecipeError(f"data.validation={source} holds token ids, and data.source text; give text, or leave it out")
    return kind


def _require_keys_of_records(config: DataConfig) -> None:
    if config.token_dtype is not None:
        raise RecipeError(f"data.token_dtype={config.token_dtype} is for files of token ids, and data.source={config.source} is "
                          "text; leave it out")  # fmt: skip
    if config.end_token is not None and config.tokenizer is None:
        raise RecipeError(f"data.end_token={config.end_token} is for text with data.tokenizer; leave it out, or give one")


def require_text_keys(config: DataConfig) -> None:
    for key in ("token_dtype", "end_token"):
        if (value := getattr(config, key)) is not None:
            raise RecipeError(f"data.{key}={value} is for files of token ids, and data.source={config.source} is text; leave it "
                              "out, or give data.format=megatron, llmc or olmo")  # fmt: skip


def _key(request: CorpusRequest, files: Sequence[TextFile]) -> str:
    data = request.data
    split = [data.split, data.validation_fraction] if request.keeps_validation else []
    listing = [[os.path.abspath(file.path), file.name, file.size_bytes, file.modified_nanoseconds] for file in files]
    made_from = json.dumps([FORMAT, data.source == STDLIB, request.vocab, split, listing])
    return hashlib.blake2b(made_from.encode(), digest_size=16).hexdigest()
