"""The cache of prepared corpora.

A cached corpus is a folder that appears by a rename once all of it is on disk; a builder that is killed leaves nothing that a
process would load:

    CACHE/KEY/corpus.json tokenizer.json train.bin validation.bin
    CACHE/KEY/checked.npz        what the first process that read all of it found
    CACHE/KEY.lock              held while building; the other processes wait, then load

KEY is a hash of what the corpus is made from (text_corpus.py). The first process that loads a corpus reads all of it and compares
it with its fingerprint; a damaged corpus is prepared again. Later processes do so only if a file has changed since (checked.py).
Every read of tokens is verified, so a change that nothing else shows is detected by the process that reads them (prepared.py).
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.documents import EndToken
from bagualu.trainer.data.listing import SourceError
from bagualu.trainer.data.prepared import SPLITS, Prepared, open_prepared
from bagualu.trainer.data.tokenised import Corpus
from bagualu.trainer.data.tokenizer import END_OF_FILE_TOKEN, load_tokenizer, token_bytes
from bagualu.trainer.data.tokenizer_files import bytes_of_tokens
from bagualu.trainer.data.whole import Documented
from bagualu.trainer.user_settings import default_cache

log = logging.getLogger(__name__)
Write = Callable[[Path, Path], None]
"""Writes a corpus into the first folder; files that are not needed afterwards go into the second."""


def cached(folder: Path, vocab: int, write: Write) -> Corpus:
    """Returns the corpus in `folder`, which `write` makes if it is not there or damaged. Several processes may call this at the
    same time: one prepares the corpus, and the others wait for it. Raises SourceError if the cache cannot be used, and what `write`
    raises."""
    try:
        corpus = _load(folder, vocab)
        if corpus is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                corpus = _load(folder, vocab) or _build(folder, vocab, write)
    except OSError as error:
        raise SourceError(f"cannot prepare the corpus in {folder.parent} ({error}); give data.cache=FOLDER that answers, with room "
                          "to write") from error  # fmt: skip
    return corpus


def cache_folder(config: DataConfig) -> Path:
    """Returns the folder of prepared corpora: data.cache or the default."""
    return Path(config.cache) if config.cache else default_cache()


def _build(folder: Path, vocab: int, write: Write) -> Corpus:
    """Prepares the corpus with `write` in a folder beside `folder` and renames that to `folder`. The caller holds the lock, so
    folders that exist already were left by a builder that was killed."""
    for leftover in [folder, *folder.parent.glob(f"{folder.name}.tmp-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.tmp-") as temporary:
        whole = Path(temporary, "corpus")
        whole.mkdir()
        write(whole, Path(temporary))
        whole.rename(folder)
    corpus = _load(folder, vocab)
    if corpus is None:
        raise OSError(f"{folder} cannot be read back")
    return corpus


def _documented(folder: Path, prepared: Prepared) -> tuple[Documented, Documented] | None:
    """Returns what the corpus in `folder` says of its documents, if it is one of records."""
    if prepared.starts is None:
        return None
    answers = prepared.answers or (None, None)
    first, second = (
        Documented(starts, wanted, folder / f"packed-{tokens}")
        for starts, wanted, tokens in zip(prepared.starts, answers, SPLITS, strict=True)
    )
    return first, second


def _load(folder: Path, vocab: int) -> Corpus | None:
    """Returns the corpus in `folder`; None if it does not exist, or if it is read whole and differs from what was prepared, which
    is logged.

    Raises OSError if the corpus cannot be read now: then it is not prepared again.
    """
    if not folder.exists():
        return None
    try:
        about = json.loads((folder / "corpus.json").read_text())
        prepared = open_prepared(folder, vocab)
        if prepared.fingerprint != about["fingerprint"]:
            raise ValueError("its contents do not match its fingerprint")
        tokenizer_path = folder / "tokenizer.json"
        tokenizer, end = load_tokenizer(tokenizer_path), EndToken(int(about.get("end", END_OF_FILE_TOKEN)))
        sizes = bytes_of_tokens(tokenizer, vocab) if about.get("given") else token_bytes(tokenizer)
        return Corpus(
            vocab,
            *prepared.tokens,
            sizes,
            prepared.fingerprint,
            tokenizer_path,
            str(about["split"]),
            (end, end),
            _documented(folder, prepared),
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        log.warning("the cached corpus %s is damaged (%s) and is prepared again", folder, error)
        return None
