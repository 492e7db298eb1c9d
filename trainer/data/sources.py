"""Where text comes from: the files behind `data.source`, and which of them are kept for validation."""

import contextlib
import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bagualu.comm.errors import RecipeError, StorageError

STDLIB = "stdlib"
RANDOM = "random"

# Test suites double the time of preparation, tables of code points and generated help are not text anyone wrote, and
# installed packages differ from machine to machine.
_STDLIB_SKIPPED = frozenset(
    {
        *("test", "tests", "idle_test", "lib2to3"),
        *("encodings", "pydoc_data"),
        *("site-packages", "dist-packages", "__pycache__"),
    }
)

_BUILD_RECORD = "_sysconfigdata"
"""A generated table of how this interpreter was built, full of this machine's paths."""


class SourceError(RecipeError, StorageError):
    """A source or cache that is not there: where a run begins a mistake in the recipe, where it goes on storage that is away."""


@dataclass(frozen=True)
class TextFile:
    """One file of a source; `name` is its path below the source, with forward slashes."""

    path: Path
    name: str
    size_bytes: int
    modified_nanoseconds: int


@dataclass(frozen=True)
class Document:
    """A text that ends with one end-of-file token, and the side of the split it lies on."""

    name: str
    text: str
    validation: bool


def find_files(source: str) -> list[TextFile]:
    """Files of `source` that are not empty, ordered by name. Raises SourceError when there are none, or they cannot be listed.

    `stdlib` takes the .py files of the running interpreter's standard library; a folder takes every file below it whose
    name and folders do not start with a dot.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _walk(root, _STDLIB_SKIPPED, ".py") if not file.name.startswith(_BUILD_RECORD)]
        if not files:
            raise RecipeError(f"there are no sources of the standard library under {root}; give data.source=FOLDER")
    else:
        require_files(source)
        files = list(_given(source))
    return sorted(files, key=lambda file: file.name)


def require_files(source: str) -> None:
    """A file or folder given as `source` is there and not empty; stops at the first text. Raises SourceError."""
    if next(_given(source), None) is None:
        raise SourceError(f"data.source={source} holds no text; put UTF-8 text files there or give data.source=stdlib")


def _given(source: str) -> Iterator[TextFile]:
    root = Path(source)
    if root.is_file():
        status = root.stat()
        if status.st_size:
            yield TextFile(root, root.name, status.st_size, status.st_mtime_ns)
    elif root.is_dir():
        yield from _walk(root)
    else:
        raise SourceError(f"data.source={source} is not there; give a text file or folder that is, stdlib or random")


def _walk(root: Path, skipped: frozenset[str] = frozenset(), suffix: str = "") -> Iterator[TextFile]:
    """Strings rather than paths: this is most of the time that a cached corpus takes to find."""
    for folder, folders, names in os.walk(root, onerror=_cannot_list):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        for path in (os.path.join(folder, name) for name in names if name.endswith(suffix) and name[0] != "."):
            with contextlib.suppress(FileNotFoundError):  # a link to nothing
                status = os.stat(path)
                if stat.S_ISREG(status.st_mode) and status.st_size:
                    name = os.path.relpath(path, root).replace(os.sep, "/")
                    yield TextFile(Path(path), name, status.st_size, status.st_mtime_ns)


def _cannot_list(error: OSError) -> None:
    """A folder left out without a word would make another corpus."""
    problem = f"{error.filename} cannot be listed ({error.strerror}); put it right or take it out of data.source"
    raise SourceError(problem) from error


def hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest()) / 2**48


def validation_names(names: Sequence[str], fraction: float) -> set[str]:
    """The names kept for validation: those whose hash lies below `fraction`, but at least one and never all of them."""
    ordered = sorted(names, key=hash_fraction)
    below = sum(hash_fraction(name) < fraction for name in names)
    return set(ordered[: min(max(below, 1), len(names) - 1)])


def documents(source: str, files: Sequence[TextFile], fraction: float) -> Iterator[Document]:
    """Read `files`, decoded exactly (line ends as they are). A lone file is cut at a line: its end validates.

    Raises RecipeError for a file that has changed since `find_files`, and for one that is not UTF-8, except in the standard
    library, where such a file is left out.
    """
    if len(files) == 1:
        whole = _read(source, files[0]) or ""
        cut = int(len(whole) * (1 - fraction))
        cut = whole.rfind("\n", 0, cut) + 1 or cut
        yield Document(files[0].name, whole[:cut], validation=False)
        yield Document(files[0].name, whole[cut:], validation=True)
        return
    kept = validation_names([file.name for file in files], fraction)
    for file in files:
        text = _read(source, file)
        if text is not None:
            yield Document(file.name, text, file.name in kept)


def _read(source: str, file: TextFile) -> str | None:
    try:
        data = file.path.read_bytes()
        status = file.path.stat()
    except OSError as error:
        raise RecipeError(f"{file.path} cannot be read ({error.strerror}); put it right or take it out of data.source") from error
    if (len(data), status.st_mtime_ns) != (file.size_bytes, file.modified_nanoseconds):
        raise RecipeError(f"{file.path} has changed while it was read; start again when data.source={source} is left alone")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if source == STDLIB:
            return None
        problem = f"{file.path} is not UTF-8 text (byte {error.start}); convert it or take it out of data.source"
        raise RecipeError(problem) from error
