"""Provides a corpus as flat arrays of tokens, prepared once and cached."""

import os
from collections.abc import Sequence

import numpy as np
import xxhash

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.chat import ChatTemplate
from bagualu.trainer.data.config import CHAT, DOCUMENTS, RANDOM, STDLIB, WHOLE, DataConfig, require_vocab
from bagualu.trainer.data.corpus_cache import cache_folder, cached
from bagualu.trainer.data.formats import OF_TOKENS, format_of
from bagualu.trainer.data.listing import SourceError
from bagualu.trainer.data.records import HUB, OF_RECORDS, open_records, require_hub
from bagualu.trainer.data.request import CorpusRequest
from bagualu.trainer.data.requirements import require_documented, require_sequence
from bagualu.trainer.data.sources import find_files, require_files
from bagualu.trainer.data.split import NOTHING
from bagualu.trainer.data.text_corpus import of_records, of_text, reader_of, require_text_keys
from bagualu.trainer.data.token_corpus import open_tokens
from bagualu.trainer.data.token_files import has_index
from bagualu.trainer.data.tokenised import Blended, Corpus
from bagualu.trainer.data.tokenizer_files import bytes_of_tokens, open_tokenizer


def prepare(
    config: DataConfig,
    vocab: int,
    *,
    validation: bool = True,
    run_dir: str | None = None,
    length_multiple: int = 1,
) -> Corpus:
    """Returns the corpus of `config`, tokenised with exactly `vocab` entries. Several processes may call this at the same time.

    `validation`, `length_multiple`: as in `CorpusRequest`. `run_dir`: a folder that is not read as text.
    Takes seconds the first time; after that it only reads the corpus once, and files of token ids not at all. Raises RecipeError if
    the source is not of its format, or too small for one sequence or for the vocabulary; SourceError if the source is missing or
    empty, or if the cache cannot be used.
    """
    config.require_source()
    if config.blend:
        return _blend(config, vocab, validation, run_dir, length_multiple)
    if config.source == RANDOM:
        nothing = np.zeros(0, np.uint32)
        return Corpus(vocab, nothing, nothing, np.zeros(vocab, np.int64), f"random-{vocab}", None, NOTHING.kind)
    cache = cache_folder(config)
    apart = [str(cache), *([run_dir] if run_dir else [])]
    if (kind := format_of(config.source, config.format, apart)) in OF_TOKENS:
        return _of_tokens(config, kind, vocab, validation, apart, length_multiple)
    request = CorpusRequest(config, vocab, validation, length_multiple)
    as_records = _are_records(config, kind)
    key, write = of_records(request, kind, apart) if as_records else of_text(request, apart)
    corpus = cached(cache / key, vocab, write)
    if config.packing == WHOLE:
        require_documented(corpus, config)
    else:
        require_sequence(corpus, config, length_multiple)
    return corpus


def _are_records(config: DataConfig, kind: str) -> bool:
    """Returns whether the documents of data.source, of format `kind`, are tokenised one by one."""
    return kind in (*OF_RECORDS, CHAT) or config.tokenizer is not None or config.validation is not None


def _blend(config: DataConfig, vocab: int, validation: bool, run_dir: str | None, length_multiple: int) -> Corpus:
    """Returns the sources of data.blend, each prepared by itself."""
    parts: list[Blended] = []
    for entry in config.blend_entries:
        own = config.of_entry(entry)
        _require_shared_tokenizer(own, run_dir)
        corpus = prepare(own, vocab, validation=validation, run_dir=run_dir, length_multiple=length_multiple)
        if same := next((part.source for part in parts if part.corpus.fingerprint == corpus.fingerprint), None):
            raise RecipeError(f"{same} and {own.source} of data.blend hold the same tokens; give one of them, with both weights")
        parts.append(Blended(own.source, entry.weight, corpus))
    nothing = np.zeros(0, np.uint32)
    known = " ".join(part.corpus.fingerprint for part in parts)
    fingerprint = xxhash.xxh3_128_hexdigest(known.encode())
    first = parts[0].corpus
    known_bytes = all(part.corpus.tokenizer_path for part in parts)  # then all have the same tokenizer
    sizes = first.token_bytes if known_bytes else np.zeros(vocab, np.int64)
    return Corpus(vocab, nothing, nothing, sizes, fingerprint, first.tokenizer_path, first.split, blend=tuple(parts))


def _of_tokens(config: DataConfig, kind: str, vocab: int, validation: bool, apart: Sequence[str], length_multiple: int) -> Corpus:
    cache, keep = cache_folder(config), CorpusRequest(config, vocab, validation).keeps_validation
    try:
        opened = open_tokens(config, kind, vocab, cache, keep, apart)
    except OSError as error:
        raise SourceError(f"data.source={config.source} cannot be opened with data.cache={cache} ({error}); see whether both "
                          "answer, and give data.cache=FOLDER that can be written") from error  # fmt: skip
    split = NOTHING.kind if not keep else "tail" if config.validation is None else "apart"
    sizes, tokenizer_path = np.zeros(vocab, np.int64), None
    if config.tokenizer is not None:  # which tells how much text the ids stand for
        given = open_tokenizer(config.tokenizer, config.end_token or 0, vocab)
        sizes, tokenizer_path = bytes_of_tokens(given.tokenizer, vocab), given.path
    train, held_out = opened.train, opened.validation
    corpus = Corpus(vocab, train, held_out, sizes, opened.fingerprint, tokenizer_path, split, opened.documents)
    if config.packing == WHOLE:
        require_documented(corpus, config)
    if config.packing == DOCUMENTS and corpus.documents is None:
        raise RecipeError(f"data.packing=documents needs to know where documents end in data.source={config.source}, a file of "
                          "token ids; give data.end_token=ID, the id that ends each, or data.packing=stream")  # fmt: skip
    require_sequence(corpus, config, length_multiple)
    return corpus


def check_source(
    config: DataConfig, vocab: int, *, validation: bool = True, run_dir: str | None = None, length_multiple: int = 1
) -> None:
    """Checks, before a run starts, that `prepare` will find what it needs, as far as is known without preparing text: files of
    token ids are checked completely, text only for whether it can be read. Raises as `prepare` does."""
    config.require_source()
    for entry in config.blend_entries:
        own = config.of_entry(entry)
        _require_shared_tokenizer(own, run_dir)
        check_source(own, vocab, validation=validation, run_dir=run_dir, length_multiple=length_multiple)
    if config.blend:
        return
    if config.source == RANDOM:
        return
    apart = [config.cache] if config.cache else []
    apart += [run_dir] if run_dir else []
    if (kind := format_of(config.source, config.format, apart)) in OF_TOKENS:
        prepare(config, vocab, validation=validation, run_dir=run_dir, length_multiple=length_multiple)
        return
    if _are_records(config, kind):
        _check_records(CorpusRequest(config, vocab, validation, length_multiple), kind, apart)
        return
    require_vocab(vocab)
    require_text_keys(config)
    if config.source != STDLIB:
        require_files(config.source, apart)


def trains_tokenizer(config: DataConfig, run_dir: str) -> bool:
    """Returns whether the text of `config` gets a tokenizer of its own. Raises as `check_source` does."""
    if config.tokenizer is not None or config.blend or config.source == RANDOM:
        return False
    return format_of(config.source, config.format, [str(cache_folder(config)), run_dir]) not in OF_TOKENS


def _check_records(request: CorpusRequest, kind: str, apart: Sequence[str]) -> None:
    """Checks that the corpus is cached, or that its first document can be read. Raises SourceError, RecipeError."""
    data = request.data
    key, _ = of_records(request, kind, apart)
    reader = reader_of(data.source, kind, apart)
    if (cache_folder(data) / key).exists():
        return
    if kind == HUB:
        require_hub(data.source)
        return
    if data.source != STDLIB:
        require_files(data.source, apart)
    first = next(open_records(data.source, reader, data.text_field, apart).records(), None)
    if first is None:
        raise RecipeError(f"data.source={data.source} holds no documents; give another")
    if kind == CHAT and data.tokenizer is not None:
        template = ChatTemplate(open_tokenizer(data.tokenizer, data.end_token or 0, request.vocab).path)
        template.conversation(first.fields.get(data.text_field), first.where)
    else:
        first.text(data.text_field)


def _require_shared_tokenizer(config: DataConfig, run_dir: str | None) -> None:
    """Raises RecipeError for a source of a blend whose tokens would be its own."""
    apart = [str(cache_folder(config)), *([run_dir] if run_dir else [])]
    if config.format != HUB and not (os.path.exists(config.source) or has_index(config.source)):
        find_files(config.source)  # raises what is wrong
    if config.tokenizer is None and format_of(config.source, config.format, apart) not in OF_TOKENS:
        raise RecipeError(f"data.blend has {config.source}, which is text and would get a tokenizer of its own; give "
                          "data.tokenizer for all sources")  # fmt: skip
