"""Determines the format of `data.source`: the one given, or by the beginning and the ending of its files."""

import os
from collections.abc import Collection, Sequence

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.config import STDLIB, DataConfig
from bagualu.trainer.data.listing import SourceError, TextFile
from bagualu.trainer.data.records import JSONL, PARQUET, SAVED, TEXT, is_saved
from bagualu.trainer.data.sources import find_files
from bagualu.trainer.data.token_files import LLMC, MEGATRON, OLMO, TokenFile, describe, has_index, is_llmc, prefix_of, read_head

OF_TOKENS = (MEGATRON, LLMC, OLMO)
"""Formats of files that hold token ids."""
_BY_ENDING = {".bin": LLMC, ".npy": OLMO, ".jsonl": JSONL, ".ndjson": JSONL, ".parquet": PARQUET}


def format_of(source: str, given: str | None, apart: Collection[str] = ()) -> str:
    """Returns the format of a source: `given`, i.e. data.format, if it is not None. `apart`: folders that are not read.

    Raises SourceError if the source is missing or cannot be read.
    """
    if given is not None or source == STDLIB:
        return given or TEXT
    if has_index(source):
        return MEGATRON
    if is_saved(source):
        return SAVED
    if os.path.isfile(source):
        return _of_file(source)
    if not os.path.isdir(source):
        return TEXT  # whose reader says what is wrong
    return _of_folder(find_files(source, apart))


def token_files(
    source: str, kind: str, config: DataConfig, vocab: int, apart: Collection[str] = (), key: str = "data.source"
) -> list[TokenFile]:
    """Returns the token files of a source of format `kind`, one of OF_TOKENS, ordered by name. `key`: the key that names the
    source. Raises SourceError, RecipeError."""
    if kind == MEGATRON and (not os.path.isdir(source) or has_index(source)):
        paths = [prefix_of(source)]
    elif os.path.isdir(source):
        files = find_files(source, apart)
        if kind == MEGATRON:
            paths = [prefix_of(file.path) for file in files if file.name.endswith(".idx")]
        else:
            paths = [file.path for file in files]
        if not paths:
            raise RecipeError(f"{key}={source} holds no pair of PREFIX.bin and PREFIX.idx; give a folder that does, or another "
                              "data.format")  # fmt: skip
    else:
        paths = [source]
    try:
        return [describe(path, kind, vocab, config.token_dtype) for path in paths]
    except OSError as error:
        raise SourceError(f"{key}={source} cannot be read ({error.strerror}); put it right or give another") from error


def _of_file(path: str) -> str:
    if is_llmc(read_head(path)):
        return LLMC
    return _by_ending(path)


def _by_ending(name: str) -> str:
    return _BY_ENDING.get(os.path.splitext(name.removesuffix(".gz"))[1], TEXT)


def _of_folder(files: Sequence[TextFile]) -> str:
    """Returns the format of a folder in which all files have the same; that of text if they differ."""
    indices = {prefix_of(file.path) for file in files if file.name.endswith(".idx")}
    if indices and indices == {prefix_of(file.path) for file in files if file.name.endswith(".bin")} and has_index(min(indices)):
        return MEGATRON
    formats = {_by_ending(file.name) for file in files}
    return formats.pop() if len(formats) == 1 else TEXT
