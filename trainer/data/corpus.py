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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from filelock import FileLock
from numpy.typing import NDArray

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.blend import Period
from bagualu.trainer.data.build import build
from bagualu.trainer.data.build_records import RecordCorpus, build_records
from bagualu.trainer.data.chat import BESIDE_TOKENIZERS, ChatTemplate
from bagualu.trainer.data.config import CHAT, DOCUMENTS, RANDOM, STDLIB, WHOLE, DataConfig, require_vocab
from bagualu.trainer.data.documents import Documents, EndToken
from bagualu.trainer.data.formats import OF_TOKENS, format_of
from bagualu.trainer.data.listing import SourceError, TextFile
from bagualu.trainer.data.mapped import AnyTokens
from bagualu.trainer.data.prepared import ANSWERS, SPLITS, STARTS, Tokens, open_splits
from bagualu.trainer.data.records import HUB, OF_RECORDS, made_from, open_records, require_hub
from bagualu.trainer.data.request import CorpusRequest
from bagualu.trainer.data.sources import find_files, require_files
from bagualu.trainer.data.split import NOTHING
from bagualu.trainer.data.token_corpus import open_tokens
from bagualu.trainer.data.token_files import has_index
from bagualu.trainer.data.tokenizer import END_OF_FILE_TOKEN, load_tokenizer, token_bytes
from bagualu.trainer.data.tokenizer_files import bytes_of_tokens, open_tokenizer
from bagualu.trainer.data.whole import Documented

FORMAT = 4
"""A number in the KEY of a corpus. Raise it when what is stored changes."""

log = logging.getLogger(__name__)
Write = Callable[[Path, Path], None]
"""Writes a corpus into the first folder; files that are not needed afterwards go into the second."""


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to validate with.

    Files are joined, each ended by the end-of-file token. That token stands for 0 bytes: predicting it
    adds to the loss and not to the bytes, so bits per byte is never too low. For `data.source=random` the arrays are
    empty; then, and for files of token ids without data.tokenizer, there is no tokenizer and no token stands for any bytes.
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
    """The file for `tokenizer.load_tokenizer`; None for random tokens, and for files of token ids without data.tokenizer."""
    split: str = "files"
    """How the text was split: `TextSplit.kind`, which is "none" if nothing is kept for validation; "records" if some documents of
    records are; "tail" if the last tokens of files of token ids are, "apart" if other files are."""
    documents: tuple[Documents, Documents] | None = None
    """Where documents begin in the training tokens and in those for validation; None if that is not known."""
    whole: tuple[Documented, Documented] | None = None
    """What makes sequences of whole documents of both splits; None if documents are not listed."""

    blend: tuple["Blended", ...] = ()
    """The sources of a blend; then `train` and `validation` are empty."""

    @property
    def endless(self) -> bool:
        """Whether tokens are random, so that they never run out."""
        return not self.train_tokens

    @property
    def train_tokens(self) -> int:
        """The number of tokens for training, of all sources."""
        return sum(len(part.corpus.train) for part in self.blend) or len(self.train)

    @property
    def validation_tokens(self) -> int:
        return sum(len(part.corpus.validation) for part in self.blend) or len(self.validation)

    @property
    def end_token(self) -> int:
        """The token that ends each document of text."""
        documents = self.blend[0].corpus.documents if self.blend else self.documents
        return documents[0].end if documents and isinstance(documents[0], EndToken) else END_OF_FILE_TOKEN

    @property
    def period(self) -> Period:
        """The blend as the first period of a run."""
        sources, weights = [part.source for part in self.blend], [part.weight for part in self.blend]
        return Period(0, sources, [part.corpus.fingerprint for part in self.blend], weights)


@dataclass(frozen=True)
class Blended:
    """A source of a blend."""

    source: str
    weight: float
    corpus: Corpus


def bits_per_byte(nats: float, text_bytes: float) -> float | None:
    """Returns the bits per byte of text: the summed loss in nats over the summed `token_bytes` of the labels; None for 0 bytes."""
    return nats / math.log(2) / text_bytes if text_bytes else None


def show_data(corpus: Corpus, source: str) -> str:
    """Returns a line for people: how many tokens there are for training and for validation, or that random tokens never run out."""
    if corpus.endless:
        return f"data: {source} tokens without end"
    train, validation = corpus.train_tokens, corpus.validation_tokens
    kept = f"{validation:,} ({validation / (train + validation):.1%})" if validation else "none"
    source = f"blend of {len(corpus.blend)} sources" if corpus.blend else source
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
    as_records = kind in (*OF_RECORDS, CHAT) or config.tokenizer is not None
    key, write = _of_records(request, kind, apart) if as_records else _of_text(request, apart)
    folder = cache / key
    try:
        corpus = _load(folder, vocab)
        if corpus is None:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                corpus = _load(folder, vocab) or _build(folder, vocab, write)
    except OSError as error:
        problem = f"cannot prepare the corpus in {cache} ({error}); give data.cache=FOLDER that answers, with room to write"
        raise SourceError(problem) from error
    if config.packing == WHOLE:
        _require_documented(corpus, config)
    else:
        require_sequence(corpus, config, length_multiple)
    return corpus


def _require_documented(corpus: Corpus, config: DataConfig) -> None:
    """Raises RecipeError unless documents are listed, as data.packing=whole needs, and for conversations that all lose their
    answers."""
    if corpus.whole is None:
        raise RecipeError("data.packing=whole is for records, for conversations, and for text with data.tokenizer, and "
                          f"data.source={config.source} is none of them; give data.packing=documents")  # fmt: skip
    for part, documents in zip(("training", "validation"), corpus.whole, strict=True):
        _require_labels(documents, part, config)


def _require_labels(documents: Documented, part: str, config: DataConfig) -> None:
    """Raises RecipeError for conversations that all lose their answers; says how many documents are cut off."""
    length, sizes = config.sequence_length, np.diff(documents.starts) - 1
    count, cut, lost = len(sizes), int((sizes > length).sum()), documents.without_labels(length)
    if lost and lost == count:
        longer = f"data.sequence_length={sizes.max()}, which cuts nothing off, or shorter questions"
        raise RecipeError(f"none of the {count} conversations of data.source={config.source} for {part} has an answer within "
                          f"data.sequence_length={length} ({cut} are cut off there), so there is nothing to learn; give "
                          f"{longer if cut else 'answers that are not empty'}")  # fmt: skip
    if cut:
        answers = f", {lost} of them all their answers, so that nothing is learned from these" if lost else ""
        log.warning("%d of %d documents for %s are longer than data.sequence_length=%d and lose their ends%s",
                    cut, count, part, length, answers)  # fmt: skip


def check_source(
    config: DataConfig, vocab: int, *, validation: bool = True, run_dir: str | None = None, length_multiple: int = 1
) -> None:
    """Checks, before a run starts, that `prepare` will find what it needs, as far as is known without preparing text: files of
    token ids are checked completely, text only for whether it can be read. Raises as `prepare` does."""
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
    if kind in (*OF_RECORDS, CHAT) or config.tokenizer is not None:
        _check_records(CorpusRequest(config, vocab, validation, length_multiple), kind, apart)
        return
    require_vocab(vocab)
    _require_text_keys(config)
    if config.source != STDLIB:
        require_files(config.source, apart)


def _check_records(request: CorpusRequest, kind: str, apart: Sequence[str]) -> None:
    """Checks that the corpus is cached, or that its first document can be read. Raises SourceError, RecipeError."""
    data = request.data
    key, _ = _of_records(request, kind, apart)
    reader = _reader(data.source, kind, apart)
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


def _require_shared_tokenizer(config: DataConfig, run_dir: str | None) -> None:
    """Raises RecipeError for a source of a blend whose tokens would be its own."""
    apart = [str(cache_folder(config)), *([run_dir] if run_dir else [])]
    if config.format != HUB and not (os.path.exists(config.source) or has_index(config.source)):
        find_files(config.source)  # raises what is wrong
    if config.tokenizer is None and format_of(config.source, config.format, apart) not in OF_TOKENS:
        raise RecipeError(f"data.blend has {config.source}, which is text and would get a tokenizer of its own; give "
                          "data.tokenizer for all sources")  # fmt: skip


def _of_text(request: CorpusRequest, apart: Sequence[str]) -> tuple[str, Write]:
    """Returns the KEY of the corpus of text whose tokenizer is trained on it, and the function that writes it."""
    require_vocab(request.vocab)
    _require_text_keys(request.data)
    files = find_files(request.data.source, apart)

    def write(folder: Path, scratch: Path) -> None:
        build(folder, scratch, request, files)

    return _key(request, files), write


def _of_records(request: CorpusRequest, kind: str, apart: Sequence[str]) -> tuple[str, Write]:
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
    sources = [(data.source, _reader(data.source, kind, apart))]
    if data.validation is not None and keep:
        held_out = _kind_of_records(data.validation, data.format, apart)
        sources.append((data.validation, _reader(data.validation, held_out, apart)))
    tokens = None if given is None else [*map(_digest, [given.path, *_beside(given.path, chat)]), given.end]
    listings = [made_from(source, of, apart) for source, of in sources]
    made = json.dumps([FORMAT, kind, listings, data.text_field, tokens, request.vocab, keep and data.validation_fraction])

    def write(folder: Path, scratch: Path) -> None:
        source, *others = (open_records(source, of, data.text_field, apart) for source, of in sources)
        build_records(folder, RecordCorpus(source, others[0] if others else None, request, given, template))

    return hashlib.blake2b(made.encode(), digest_size=16).hexdigest(), write


def _reader(source: str, kind: str, apart: Sequence[str]) -> str:
    """Returns the format of the files of a source: `kind`, or that of the records in which conversations lie. Raises
    RecipeError."""
    if kind != CHAT:
        return kind
    found = format_of(source, None, apart)
    if found not in OF_RECORDS:
        raise RecipeError(f"data.source={source} is no file of records, in which data.format=chat finds conversations; give JSON "
                          "lines (.jsonl), Parquet or a saved dataset")  # fmt: skip
    return found


def _beside(tokenizer: Path, chat: bool) -> list[Path]:
    """Returns the files beside a tokenizer that conversations depend on."""
    return [path for name in BESIDE_TOKENIZERS if chat and (path := tokenizer.parent / name).is_file()]


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


def _require_text_keys(config: DataConfig) -> None:
    for key in ("token_dtype", "validation", "end_token"):
        if (value := getattr(config, key)) is not None:
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
    sizes, tokenizer_path = np.zeros(vocab, np.int64), None
    if config.tokenizer is not None:  # which tells how much text the ids stand for
        given = open_tokenizer(config.tokenizer, config.end_token or 0, vocab)
        sizes, tokenizer_path = bytes_of_tokens(given.tokenizer, vocab), given.path
    train, held_out = opened.train, opened.validation
    corpus = Corpus(vocab, train, held_out, sizes, opened.fingerprint, tokenizer_path, split, opened.documents)
    if config.packing == WHOLE:
        _require_documented(corpus, config)
    if config.packing == DOCUMENTS and corpus.documents is None:
        raise RecipeError(f"data.packing=documents needs to know where documents end in data.source={config.source}, a file of "
                          "token ids; give data.end_token=ID, the id that ends each, or data.packing=stream")  # fmt: skip
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


def _documented(folder: Path) -> tuple[Documented, Documented] | None:
    """Returns what the corpus in `folder` says of its documents, if it is one of records. Raises OSError, ValueError."""
    if not all((folder / name).exists() for name in STARTS):
        return None
    splits = []
    for starts, answers, tokens in zip(STARTS, ANSWERS, SPLITS, strict=True):
        path = folder / answers
        wanted = Tokens(path, 2) if path.exists() else None
        splits.append(Documented(np.fromfile(folder / starts, np.int64), wanted, folder / f"packed-{tokens}"))
    return splits[0], splits[1]


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
        tokenizer, end = load_tokenizer(tokenizer_path), EndToken(int(about.get("end", END_OF_FILE_TOKEN)))
        sizes = bytes_of_tokens(tokenizer, vocab) if about.get("given") else token_bytes(tokenizer)
        whole = _documented(folder)
        return Corpus(vocab, train, validation, sizes, fingerprint, tokenizer_path, str(about["split"]), (end, end), whole)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        log.warning("the cached corpus %s is damaged (%s) and is prepared again", folder, error)
        return None
