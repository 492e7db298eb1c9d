"""Opens files of token ids as the training and validation tokens of a run."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.config import DOCUMENTS, DataConfig
from bagualu.trainer.data.documents import Documents, EndToken, IndexedDocuments
from bagualu.trainer.data.formats import OF_TOKENS, format_of, token_files
from bagualu.trainer.data.mapped import MappedFile, MappedTokens
from bagualu.trainer.data.scan import Scanned, scan
from bagualu.trainer.data.token_files import TokenFile, document_offsets


@dataclass(frozen=True)
class OpenedTokens:
    """The tokens of a run, and the hash of all files that they come from."""

    train: MappedTokens
    validation: MappedTokens
    fingerprint: str
    documents: tuple[Documents, Documents] | None
    """Where documents begin in the training tokens and in those for validation; None if the files do not say."""


def open_tokens(config: DataConfig, kind: str, vocab: int, cache: Path, keep: bool, apart: Collection[str] = ()) -> OpenedTokens:
    """Returns the tokens of data.source, a source of format `kind`. With `keep`, those for validation come from data.validation or,
    if that is None, are the last data.validation_fraction of the source.

    Each file is read once to check its ids; the result is kept in `cache`. Raises SourceError, OSError, and RecipeError for damaged
    files and ids that are not in a vocabulary of `vocab` entries.
    """
    files = token_files(config.source, kind, config, vocab, apart)
    scanned = _scanned(files, vocab, cache)
    everything = MappedTokens(_mapped(files, scanned))
    count, digests = len(everything), [result.digest for result in scanned]
    if not keep:
        nothing = MappedTokens(everything.parts, 0, 0)
        return OpenedTokens(everything, nothing, _combined(digests, count), _documents(config, everything, nothing))
    if config.validation is None:
        cut = count - max(1, round(count * config.validation_fraction))
        tail = MappedTokens(everything.parts, cut, count)
        head = MappedTokens(everything.parts, 0, cut)
        return OpenedTokens(head, tail, _combined(digests, cut), _documents(config, head, tail))
    others = _held_out(config, vocab, apart)
    scanned = _scanned(others, vocab, cache)
    fingerprint = _combined([*digests, "validation", *(result.digest for result in scanned)], count)
    held_out = MappedTokens(_mapped(others, scanned))
    return OpenedTokens(everything, held_out, fingerprint, _documents(config, everything, held_out))


def _documents(config: DataConfig, train: MappedTokens, validation: MappedTokens) -> tuple[Documents, Documents] | None:
    """Returns where documents begin in both splits: by the index of Megatron, else after data.end_token."""
    if config.end_token is not None:
        return EndToken(config.end_token), EndToken(config.end_token)
    if config.packing != DOCUMENTS:
        return None
    indexed = [_indexed(tokens) for tokens in (train, validation)]
    return None if indexed[0] is None or indexed[1] is None else (indexed[0], indexed[1])


def _indexed(tokens: MappedTokens) -> IndexedDocuments | None:
    indices = []
    for part in tokens.parts:
        if (index := part.file.index) is None:
            return None
        indices.append((document_offsets(index), part.tokens.itemsize))
    return IndexedDocuments(tokens.begins, indices, tokens.start)


def _held_out(config: DataConfig, vocab: int, apart: Collection[str]) -> list[TokenFile]:
    """Returns the files of data.validation. Raises SourceError, RecipeError."""
    assert config.validation is not None
    kind = format_of(config.validation, config.format, apart)
    if kind not in OF_TOKENS:
        raise RecipeError(f"data.validation={config.validation} is no file of tokens, as data.source={config.source} is; give one "
                          "that is, or leave it out")  # fmt: skip
    return token_files(config.validation, kind, config, vocab, apart, key="data.validation")


def _scanned(files: Sequence[TokenFile], vocab: int, cache: Path) -> list[Scanned]:
    results = []
    for file in files:
        result = scan(file, cache)
        _require_ids(file, result, vocab)
        results.append(result)
    return results


def _require_ids(file: TokenFile, result: Scanned, vocab: int) -> None:
    if result.halves and not file.headed:
        raise RecipeError(f"every second token of {file.name}, read as {file.dtype}, is 0: its tokens seem to have 4 bytes; give "
                          "data.token_dtype=uint32")  # fmt: skip
    if not 0 <= result.least <= result.most < vocab:
        token = result.most if result.most >= vocab else result.least
        fix = f"give model.vocab={result.most + 1} or more" if token >= 0 and file.headed else "tokenise it again"
        if not file.headed:
            other = "uint16" if file.dtype == "uint32" else "uint32"
            fix = f"give model.vocab={result.most + 1} or more, or data.token_dtype={other} if its tokens are not {file.dtype}"
        raise RecipeError(f"{file.name} has token {token}, but model.vocab={vocab}; {fix}")


def _mapped(files: Sequence[TokenFile], scanned: Sequence[Scanned]) -> list[MappedFile]:
    """Maps the files. Raises RecipeError for a file that has changed since it was scanned."""
    parts = []
    for file, result in zip(files, scanned, strict=True):
        if file.index is not None:
            file = replace(file, index=replace(file.index, aligned=result.documents_are_sequences))
        part = MappedFile(file)
        if list(part.opened) != result.signature[:2]:
            raise RecipeError(f"{file.name} changed while it was read; start again when it no longer changes")
        parts.append(part)
    return parts


def _combined(digests: Sequence[str], train: int) -> str:
    """Returns the hash of the files with these hashes, of which the first `train` tokens are for training."""
    return xxhash.xxh3_128_hexdigest(" ".join([*digests, str(train)]).encode())
