"""Reads documents out of JSON lines, Parquet, saved datasets and datasets of the Hugging Face hub, one after the other."""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.config import STDLIB
from bagualu.trainer.data.listing import SourceError, TextFile, printable
from bagualu.trainer.data.reading import is_utf8, whole
from bagualu.trainer.data.sources import find_files

TEXT, JSONL, PARQUET, SAVED, HUB = "text", "jsonl", "parquet", "saved", "hub"
OF_RECORDS = (JSONL, PARQUET, SAVED, HUB)
"""Formats whose documents are records with a field of text."""
_TRAINING = "train"
_HELD_OUT = ("validation", "test")
"""Names of the split of a saved dataset or of the hub that is for validation; the first that there is."""
_HUB_SECONDS = 20.0
_LONGEST_BYTES = 2**30


@dataclass(frozen=True)
class SourceRecord:
    """A document. `name` depends on its place in the source alone; `where` says it to people."""

    name: str
    where: str
    fields: dict[str, Any]

    def text(self, field: str) -> str:
        """Returns a field. Raises RecipeError if there is none or if it is no text."""
        if field not in self.fields:
            near = ", ".join(list(self.fields)[:6])
            raise RecipeError(f"{self.where} has no field {field}; give data.field as one of {near}")
        value = self.fields[field]
        if not isinstance(value, str):
            raise RecipeError(f"{self.where}: field {field} is no text but {type(value).__name__}; give another data.field, or "
                              "correct it")  # fmt: skip
        return value


@dataclass(frozen=True)
class RecordSource:
    """The documents of a source."""

    records: Callable[[], Iterator[SourceRecord]]
    """Yields them, the same in each call. Raises RecipeError for one that cannot be read."""
    held_out: Callable[[], Iterator[SourceRecord]] | None = None
    """Yields those that the source itself keeps for validation; None if it keeps none."""
    size_bytes: int | None = None
    """About how many bytes there are to read; None if that is not known."""


def made_from(source: str, kind: str, apart: Collection[str] = ()) -> list[Any]:
    """Returns, as JSON, what tells a source from others and from itself after a change; a dataset of the hub is known by its name
    alone, so that it is found in the cache without network. Raises SourceError, RecipeError."""
    if kind == HUB:
        return [HUB, source]
    files = find_files(source, apart)
    return [kind, [[os.path.abspath(file.path), file.name, file.size_bytes, file.modified_nanoseconds] for file in files]]


def open_records(source: str, kind: str, field: str, apart: Collection[str] = ()) -> RecordSource:
    """Returns the documents of a source of format `kind`, one of OF_RECORDS or text, whose files are documents with this one field.
    Raises SourceError, RecipeError."""
    if kind == HUB:
        return _hub(source)
    files = [file for file in find_files(source, apart) if source != STDLIB or is_utf8(file)]
    size = sum(file.size_bytes for file in files)
    if kind == SAVED:
        return _saved(source, size)
    readers: dict[str, Callable[[TextFile], Iterator[SourceRecord]]] = {JSONL: _json_lines, PARQUET: _parquet}
    readers[TEXT] = partial(_text_file, field)
    read = readers[kind]

    def records() -> Iterator[SourceRecord]:
        for file in files:
            yield from read(file)

    return RecordSource(records, None, size)


def _text_file(field: str, file: TextFile) -> Iterator[SourceRecord]:
    if file.size_bytes > _LONGEST_BYTES:
        raise RecipeError(f"{printable(file.path)} is one document of {file.size_bytes} bytes, too long for a given tokenizer; cut "
                          "it into files, or write it as JSON lines, a document each")  # fmt: skip
    yield SourceRecord(file.name, printable(file.path), {field: "".join(whole(file).pieces())})


def _json_lines(file: TextFile) -> Iterator[SourceRecord]:
    opener: Any = gzip.open if file.path.endswith(".gz") else open
    try:
        with opener(file.path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where = f"{printable(file.path)}, line {number}"
                    yield SourceRecord(f"{file.name}:{number}", where, _object(line, where))
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(file, error) from error


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where} is not UTF-8 (byte {error.start}); correct or remove it") from error
    except ValueError as error:
        raise RecipeError(f"{where} is broken JSON ({error}); correct or remove it") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{where} is no JSON object; write one object with a field of text on each line")
    return value


def _parquet(file: TextFile) -> Iterator[SourceRecord]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file.path).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield SourceRecord(f"{file.name}:{number}", f"{printable(file.path)}, row {number}", fields)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: TextFile, error: Exception) -> RecipeError:
    why = getattr(error, "strerror", None) or " ".join(str(error).split())
    return RecipeError(f"{printable(file.path)} cannot be read ({why}); put it right or take it out of data.source")


def is_saved(folder: str) -> bool:
    """Whether `folder` holds what `save_to_disk` of the library datasets writes."""
    return Path(folder, "dataset_dict.json").is_file() or (
        Path(folder, "dataset_info.json").is_file() and Path(folder, "state.json").is_file()
    )


def _saved(source: str, size: int) -> RecordSource:
    import datasets

    if not is_saved(source):
        raise RecipeError(f"data.source={source} is no saved dataset; give a folder that datasets' save_to_disk wrote")
    try:
        found = datasets.load_from_disk(source)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"data.source={source} cannot be loaded ({' '.join(str(error).split())}); save it again") from error
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {_TRAINING: found}
    return _of_splits(source, splits, size)


def _hub(source: str) -> RecordSource:
    """`source`: owner/name, or owner/name:subset."""
    import datasets

    name, _, subset = source.partition(":")
    try:
        splits = dict(datasets.load_dataset(name, subset or None, streaming=True))
    except Exception as error:
        raise SourceError(hub_problem(source, error)) from error
    return _of_splits(source, splits, None)


def hub_problem(source: str, error: Exception) -> str:
    """Returns the line for a dataset of the hub that cannot be opened."""
    why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return (f"data.source={source} cannot be opened on the Hugging Face hub ({why}); see whether this machine has network and the "
            "name is right, or give data.format=saved and a folder that save_to_disk of datasets wrote elsewhere")  # fmt: skip


def require_hub(source: str) -> None:
    """Raises SourceError unless the hub knows the dataset, without waiting for it for long."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(source.partition(":")[0], timeout=_HUB_SECONDS)
    except Exception as error:
        raise SourceError(hub_problem(source, error)) from error


def _of_splits(source: str, splits: dict[str, Any], size: int | None) -> RecordSource:
    if _TRAINING not in splits:
        raise RecipeError(f"data.source={source} has no split {_TRAINING}, only {', '.join(splits)}; save the one to train on by "
                          "itself")  # fmt: skip
    held_out = next((name for name in _HELD_OUT if name in splits), None)

    def rows(split: str) -> Iterator[SourceRecord]:
        number = 0
        try:
            for number, fields in enumerate(splits[split], 1):
                yield SourceRecord(f"{split}:{number}", f"data.source={source}, split {split}, row {number}", dict(fields))
        except (OSError, ValueError) as error:  # of the library or the network
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise SourceError(f"data.source={source}, split {split}, cannot be read after row {number} ({why}); start again, or "
                              "put it right") from error  # fmt: skip

    return RecordSource(partial(rows, _TRAINING), None if held_out is None else partial(rows, held_out), size)
