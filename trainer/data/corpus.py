"""Provides a corpus as flat arrays of tokens, prepared once and cached.

A cached corpus is a folder that appears by a rename once all of it is on disk; a builder that is killed leaves nothing that a
process would load:

    CACHE/KEY/corpus.json tokenizer.json train.bin validation.bin
    CACHE/KEY.lock              held while building; the other processes wait, then load

KEY is a hash of what the corpus is made from (names, sizes and modification times of the files, vocabulary, split). Every process
that loads a corpus reads all of it once and compares it with its fingerprint; a damaged corpus is prepared again. Later changes are
detected by the process that reads the changed tokens (prepared.py).
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.build import build
from bagualu.trainer.data.config import RANDOM, STDLIB, DataConfig, require_vocab
from bagualu.trainer.data.formats import OF_TOKENS, format_of
from bagualu.trainer.data.listing import SourceError, TextFile
from bagualu.trainer.data.mapped import AnyTokens
from bagualu.trainer.data.prepared import open_splits
from bagualu.trainer.data.request import CorpusRequest
from bagualu.trainer.data.sources import find_files, require_files
from bagualu.trainer.data.split import NOTHING
from bagualu.trainer.data.token_corpus import open_tokens
from bagualu.trainer.data.tokenizer import load_tokenizer, token_bytes

FORMAT = 3
"""A number in the KEY of a corpus. Raise it when what is stored changes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to validate with.

    Files are joined, each ended by the end-of-file token. That token stands for 0 bytes: predicting it
    adds to the loss and not to the bytes, so bits per byte is never too low. For `data.source=random` the arrays are
    empty; then, and for files of token ids, there is no tokenizer and no token stands for any bytes.
    """

    vocab: int
    train: AnyTokens
    """Tokens of the training split, flat, uint16 or uint32."""
    validation: AnyTokens
    """Tokens of the validation split, flat; empty if nothing is kept for validation."""
    token_bytes: NDArray[np.int64]
    """[vocab]: the number of bytes of text that each token stands for."""
    fingerprint: str
    """Hash of the tokenizer and of every token: equal on two machines when they train on the same data."""
    tokenizer_path: Path | None
    """The file for `tokenizer.load_tokenizer`; None for random tokens and files of token ids."""
    split: str = "files"
    """How the text was split: `TextSplit.kind`, which is "none" if nothing is kept for validation; "tail" if the last tokens of
    files of token ids are, "apart" if other files are."""

    @property
    def endless(self) -> bool:
        """Whether tokens are random, so that they never run out."""
        return not len(self.train)


def bits_per_byte(nats: float, text_bytes: float) -> float | None:
    """Returns the bits per byte of text: the summed loss in nats over the summed `token_bytes` of the labels; None for 0 bytes."""
    return nats / math.log(2) / text_bytes if text_bytes else None


def show_data(corpus: Corpus, source: str) -> str:
    """Returns a line for people: how many tokens there are for training and for validation, or that random tokens never run out."""
    if corpus.endless:
        return f"data: {source} tokens without end"
    train, validation = len(corpus.train), len(corpus.validation)
    kept = f"{validation:,} ({validation / (train + validation):.1%})" if validation else "none"
    return f"data: {source}, {train:,} tokens to train on, {kept} to validate with"


def default_cache() -> Path:
    """Returns $XDG_CACHE_HOME/bagualu or, if the variable is not set, ~/.cache/bagualu. It is the user's setting for all caches."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bagualu"


def cache_folder(config: DataConfig) -> Path:
    """Returns the folder of prepared corpora: data.cache or the default."""
    return Path(config.cache) if config.cache else default_cache()


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
    if config.source == RANDOM:
        nothing = np.zeros(0, np.uint32)
        return Corpus(vocab, nothing, nothing, np.zeros(vocab, np.int64), f"random-{vocab}", None, NOTHING.kind)
    cache = cache_folder(config)
    apart = [str(cache), *([run_dir] if run_dir else [])]
    if (kind := format_of(config.source, config.format, apart)) in OF_TOKENS:
        return _of_tokens(config, kind, vocab, validation, apart, length_multiple)
    require_vocab(vocab)
    _require_text_keys(config)
    request = CorpusRequest(config, vocab, validation, length_multiple)
    files = find_files(config.source, apart)
    folder = cache / _key(request, files)
    try:
        corpus = _load(folder, vocab)
        if corpus is None:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                corpus = _load(folder, vocab) or _build(folder, request, files)
    except OSError as error:
        problem = f"cannot prepare the corpus in {cache} ({error}); give data.cache=FOLDER that answers, with room to write"
        raise SourceError(problem) from error
    require_sequence(corpus, config, length_multiple)
    return corpus


def check_source(
    config: DataConfig, vocab: int, *, validation: bool = True, run_dir: str | None = None, length_multiple: int = 1
) -> None:
    """Checks, before a run starts, that `prepare` will find what it needs, as far as is known without preparing text: files of
    token ids are checked completely, text only for whether it can be read. Raises as `prepare` does."""
    if config.source == RANDOM:
        return
    apart = [config.cache] if config.cache else []
    apart += [run_dir] if run_dir else []
    if format_of(config.source, config.format, apart) in OF_TOKENS:
        prepare(config, vocab, validation=validation, run_dir=run_dir, length_multiple=length_multiple)
        return
    require_vocab(vocab)
    _require_text_keys(config)
    if config.source != STDLIB:
        require_files(config.source, apart)


def _require_text_keys(config: DataConfig) -> None:
    for key, value in (("token_dtype", config.token_dtype), ("validation", config.validation)):
        if value is not None:
            raise RecipeError(f"data.{key}={value} is for files of token ids, and data.source={config.source} is text; leave it "
                              "out, or give data.format=megatron, llmc or olmo")  # fmt: skip


def _of_tokens(config: DataConfig, kind: str, vocab: int, validation: bool, apart: Sequence[str], length_multiple: int) -> Corpus:
    cache, keep = cache_folder(config), CorpusRequest(config, vocab, validation).keeps_validation
    try:
        opened = open_tokens(config, kind, vocab, cache, keep, apart)
    except OSError as error:
        raise SourceError(f"data.source={config.source} cannot be opened with data.cache={cache} ({error}); see whether both "
                          "answer, and give data.cache=FOLDER that can be written") from error  # fmt: skip
    split = NOTHING.kind if not keep else "tail" if config.validation is None else "apart"
    nothing = np.zeros(vocab, np.int64)
    corpus = Corpus(vocab, opened.train, opened.validation, nothing, opened.fingerprint, None, split)
    require_sequence(corpus, config, length_multiple)
    return corpus


def require_sequence(corpus: Corpus, config: DataConfig, length_multiple: int = 1) -> None:
    """Raises RecipeError unless the training split, and the validation split if one is kept, hold at least one sequence
    (`sequence_length` + 1 tokens)."""
    counts = (len(corpus.train), len(corpus.validation))
    request = CorpusRequest(config, corpus.vocab, corpus.split != NOTHING.kind, length_multiple=length_multiple)
    longest = request.longest_sequence(counts)
    if longest >= config.sequence_length:
        return
    part, tokens = ("validation", counts[1]) if request.validation and counts[1] < counts[0] else ("training", counts[0])
    advice = f"data.sequence_length={longest} or more text" if longest else "more text"
    raise RecipeError(f"the {part} split of data.source={config.source} has {tokens} tokens but one sequence reads "
                      f"{config.sequence_length + 1}; give {advice}")  # fmt: skip


def _key(request: CorpusRequest, files: Sequence[TextFile]) -> str:
    data = request.data
    split = [data.split, data.validation_fraction] if request.keeps_validation else []
    listing = [[os.path.abspath(file.path), file.name, file.size_bytes, file.modified_nanoseconds] for file in files]
    made_from = json.dumps([FORMAT, data.source == STDLIB, request.vocab, split, listing])
    return hashlib.blake2b(made_from.encode(), digest_size=16).hexdigest()


def _build(folder: Path, request: CorpusRequest, files: Sequence[TextFile]) -> Corpus:
    """Prepares the corpus in a folder beside `folder` and renames that to `folder`. The caller holds the lock, so folders that
    exist already were left by a builder that was killed."""
    for leftover in [folder, *folder.parent.glob(f"{folder.name}.tmp-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.tmp-") as temporary:
        whole = Path(temporary, "corpus")
        whole.mkdir()
        build(whole, Path(temporary), request, files)
        whole.rename(folder)
    corpus = _load(folder, request.vocab)
    if corpus is None:
        raise OSError(f"{folder} cannot be read back")
    return corpus


def _load(folder: Path, vocab: int) -> Corpus | None:
    """Returns the corpus in `folder`; None if it does not exist, or if any byte differs from what was prepared, which is logged.

    Raises OSError if the corpus cannot be read now: then it is not prepared again.
    """
    if not folder.exists():
        return None
    try:
        about = json.loads((folder / "corpus.json").read_text())
        train, validation, fingerprint = open_splits(folder, vocab)
        if fingerprint != about["fingerprint"]:
            raise ValueError("its contents do not match its fingerprint")
        tokenizer_path = folder / "tokenizer.json"
        sizes = token_bytes(load_tokenizer(tokenizer_path))
        return Corpus(vocab, train, validation, sizes, fingerprint, tokenizer_path, str(about["split"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        log.warning("the cached corpus %s is damaged (%s) and is prepared again", folder, error)
        return None
