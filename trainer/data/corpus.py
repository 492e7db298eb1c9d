"""A corpus as flat arrays of tokens, prepared once and cached.

A cached corpus is a folder that appears by one rename when all of it is on disk; a killed builder leaves nothing that
anyone would load:

    CACHE/KEY/corpus.json tokenizer.json train.bin validation.bin
    CACHE/KEY.lock              held while building; the other processes wait, then load

KEY is a hash of what the corpus is made from (names, sizes and modification times of the files, vocabulary, split). Whoever loads
it reads all of it once and compares it with its fingerprint: a cached corpus that is damaged in any way is prepared again. What
happens to it later is seen by whoever reads the place (prepared.py).
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
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.prepared import AnyTokens, open_splits
from bagualu.trainer.data.sources import RANDOM, SourceError, TextFile, find_files
from bagualu.trainer.data.tokenizer import SMALLEST_VOCAB, load_tokenizer, token_bytes

FORMAT = 2
"""Part of the key: raise it when what is stored changes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to validate with.

    Files are joined, each ended by the end-of-file token. That token stands for 0 bytes: a model pays for predicting
    it and gets no bytes in return, so bits per byte is never flattered. For `data.source=random` the arrays are
    empty, there is no tokenizer and no token stands for any bytes.
    """

    vocab: int
    train: AnyTokens
    """Tokens of the training split, flat, uint16 or uint32."""
    validation: AnyTokens
    token_bytes: NDArray[np.int64]
    """[vocab]: bytes of text that each token stands for."""
    fingerprint: str
    """Hash of the tokenizer and of every token: equal on two machines when they train on the same data."""
    tokenizer_path: Path | None
    """For bagualu.trainer.data.tokenizer.load_tokenizer."""


def bits_per_byte(nats: float, text_bytes: float) -> float | None:
    """Bits per byte of text: summed loss in nats over the summed `token_bytes` of the labels. None for 0 bytes."""
    return nats / math.log(2) / text_bytes if text_bytes else None


def default_cache() -> Path:
    """$XDG_CACHE_HOME/bagualu or ~/.cache/bagualu: the user's one setting for where caches lie, so it is read here."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bagualu"


def prepare(config: DataConfig, vocab: int) -> Corpus:
    """The corpus of `config`, tokenised with exactly `vocab` entries. Safe from several processes at once.

    Takes seconds the first time and milliseconds after that. Raises RecipeError when the source is not text, or too small for one
    sequence or for the vocabulary, SourceError when it is missing or empty, or the cache does not answer.
    """
    if config.source == RANDOM:
        nothing = np.zeros(0, np.uint32)
        return Corpus(vocab, nothing, nothing, np.zeros(vocab, np.int64), f"random-{vocab}", None)
    if vocab < SMALLEST_VOCAB:
        problem = f"model.vocab={vocab} cannot hold every byte and the end of a file"
        raise RecipeError(f"{problem}; give model.vocab={SMALLEST_VOCAB} or more")
    files = find_files(config.source)
    cache = Path(config.cache) if config.cache else default_cache()
    folder = cache / _key(config, vocab, files)
    try:
        corpus = _load(folder, vocab)
        if corpus is None:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                corpus = _load(folder, vocab) or _build(folder, config, vocab, files)
    except OSError as error:
        problem = f"cannot prepare the corpus in {cache} ({error}); give data.cache=FOLDER that answers, with room to write"
        raise SourceError(problem) from error
    require_sequence(corpus, config)
    return corpus


def require_sequence(corpus: Corpus, config: DataConfig) -> None:
    """Raise RecipeError unless both splits hold at least one sequence (`sequence_length` + 1 tokens)."""
    for split, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) <= config.sequence_length:
            raise RecipeError(
                f"the {split} split of data.source={config.source} has {len(tokens)} tokens but one sequence reads "
                f"{config.sequence_length + 1}; give data.sequence_length={max(len(tokens) - 1, 1)} or more text"
            )


def _key(config: DataConfig, vocab: int, files: Sequence[TextFile]) -> str:
    listing = [[os.path.abspath(file.path), file.size_bytes, file.modified_nanoseconds] for file in files]
    made_from = json.dumps([FORMAT, config.source, vocab, config.validation_fraction, listing])
    return hashlib.blake2b(made_from.encode(), digest_size=16).hexdigest()


def _build(folder: Path, config: DataConfig, vocab: int, files: Sequence[TextFile]) -> Corpus:
    """Prepare beside `folder` and rename. The caller holds the lock: what lies here is left from a killed builder."""
    # Here and not above: `datasets` takes over a second to import, and mostly there is nothing to prepare.
    from bagualu.trainer.data.build import build

    for leftover in [folder, *folder.parent.glob(f"{folder.name}.tmp-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.tmp-") as temporary:
        whole = Path(temporary, "corpus")
        whole.mkdir()
        build(whole, Path(temporary), config, vocab, files)
        whole.rename(folder)
    corpus = _load(folder, vocab)
    if corpus is None:
        raise OSError(f"{folder} cannot be read back")
    return corpus


def _load(folder: Path, vocab: int) -> Corpus | None:
    """The corpus in `folder`; None when it is not there, or is not to the byte what was prepared, which is said.

    Raises OSError when that cannot be told: what cannot be read now is not prepared again.
    """
    if not folder.exists():
        return None
    try:
        about = json.loads((folder / "corpus.json").read_text())
        train, validation, fingerprint = open_splits(folder, vocab)
        if fingerprint != about["fingerprint"]:
            raise ValueError("its contents do not match its fingerprint")
        tokenizer_path = folder / "tokenizer.json"
        return Corpus(vocab, train, validation, token_bytes(load_tokenizer(tokenizer_path)), fingerprint, tokenizer_path)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        log.warning("the cached corpus %s is damaged (%s) and is prepared again", folder, error)
        return None
