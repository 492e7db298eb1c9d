"""Lists the files below a folder that are text to train on, and decides which folders are entered and which are skipped.

What a link points to is read under the name of the link. Each file and folder is read once: a link to one that is read anyway adds
nothing, so circular links end. Folders of runs and of prepared corpora are never read as text.
"""

import contextlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bagualu.comm.errors import RecipeError, StorageError
from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH
from bagualu.fault_tolerance.run_directory import JOB_SCRIPT_BEGINS, RunDirectory

_RESOLVED_BYTES = 2**18
_SECTIONS = frozenset({"run", "model", "data", "train", "optim", "parallel"})
"""Top-level keys of every resolved recipe."""
_OF_A_CORPUS = ("corpus.json", "tokenizer.json", "train.bin")
"""Files that together identify a folder as a prepared corpus."""


class SourceError(RecipeError, StorageError):
    """A source or cache is missing or cannot be used. For a run that begins this is a mistake in the recipe; for a run that
    resumes, its storage is unavailable."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of a source; `name` is its path relative to the source, with forward slashes."""

    path: str
    name: str
    size_bytes: int
    modified_nanoseconds: int


@dataclass
class Tree:
    """The files below `root` that are not empty. Hidden files and folders (.name) are skipped."""

    root: str
    apart: Collection[str] = ()
    """Folders to skip besides those of runs; they need not exist."""
    skipped: frozenset[str] = frozenset()
    """Names of folders to skip."""
    suffix: str = ""
    """Only files whose names end in this are listed; "": all files."""
    follow: bool = True
    """Whether links to folders are followed."""
    _read: set[tuple[int, int]] = field(default_factory=set)
    """Device and inode of every folder that was entered or skipped."""
    _links: list[str] = field(default_factory=list)
    """Links to folders."""
    _files: set[tuple[int, int]] = field(default_factory=set)
    """Device and inode of every file that was yielded."""
    _file_links: list[tuple[str, os.stat_result]] = field(default_factory=list)
    """Links to files, with the status of the file."""

    def files(self) -> Iterator[TextFile]:
        """Yields the files in no particular order. Raises SourceError if a folder cannot be listed, RecipeError for a name that is
        not UTF-8 and if `root` itself is the folder of a run or of prepared corpora."""
        for folder in self.apart:
            if os.path.isdir(folder):
                self._read.add(_identity(folder))
        if _identity(self.root) in self._read or is_made_here(self.root):
            raise RecipeError(f"data.source={printable(self.root)} is the folder of a run or of prepared corpora, whose files are "
                              "no text to train on; give the folder of the text, or another run.dir or data.cache")  # fmt: skip
        yield from self._below(self.root)
        while self._links:  # after all real folders, so that these keep their own names
            yield from self._below(self._links.pop(0))
        for link, status in self._file_links:
            if (status.st_dev, status.st_ino) not in self._files:
                yield self._file(link, status)

    def _below(self, folder: str) -> Iterator[TextFile]:
        identity = _identity(folder)
        if identity in self._read or (folder != self.root and is_made_here(folder)):
            return
        self._read.add(identity)
        folders = []
        try:
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise _unlisted(folder, error) from error
        for entry in listed:
            if entry.name.startswith("."):
                continue
            status = _status(entry)
            if status is None:
                continue
            if stat.S_ISDIR(status.st_mode):
                if entry.name not in self.skipped:
                    folders.append(entry)
            elif stat.S_ISREG(status.st_mode) and status.st_size and entry.name.endswith(self.suffix):
                require_utf8_name(entry.path)
                if not entry.is_symlink():
                    yield self._file(entry.path, status)
                elif not self._leads_into_a_run(entry.path):
                    self._file_links.append((entry.path, status))
        for entry in folders:
            require_utf8_name(entry.path)
            if not entry.is_symlink():
                yield from self._below(entry.path)
            elif self.follow and not self._leads_into_a_run(entry.path):
                self._links.append(entry.path)

    def _file(self, path: str, status: os.stat_result) -> TextFile:
        self._files.add((status.st_dev, status.st_ino))
        name = os.path.relpath(path, self.root).replace(os.sep, "/")
        return TextFile(path, name, status.st_size, status.st_mtime_ns)

    def _leads_into_a_run(self, link: str) -> bool:
        """Whether the target of `link` lies in the folder of a run, or in one of `apart`, that does not contain the source as
        well."""
        own = os.path.realpath(self.root)
        apart = {os.path.realpath(folder) for folder in self.apart}
        for parent in map(str, Path(os.path.realpath(link)).parents):
            if Path(own).is_relative_to(parent):
                return False
            if parent in apart or is_made_here(parent):
                return True
        return False


def is_made_here(folder: str) -> bool:
    """Whether `folder` holds a run or a prepared corpus, recognised by a resolved recipe or by other files written there."""
    run = RunDirectory(folder)
    if os.path.isfile(run.config):
        try:
            with run.config.open("rb") as stream:
                keys = set(re.findall(r"^(\w+):", stream.read(_RESOLVED_BYTES).decode("utf-8", "replace"), re.MULTILINE))
        except OSError:
            keys = set()
        if keys >= _SECTIONS:
            return True
    if os.path.isfile(run.job_script):
        with contextlib.suppress(OSError), run.job_script.open("rb") as stream:
            if stream.read(len(JOB_SCRIPT_BEGINS)) == JOB_SCRIPT_BEGINS.encode():
                return True
    without_recipe = [run.checkpoints / EPOCH], [run.metrics, run.ledger]
    corpus = [run.path / name for name in _OF_A_CORPUS]
    return any(all(os.path.isfile(path) for path in paths) for paths in (*without_recipe, corpus))


def printable(path: str) -> str:
    """Returns `path` as a line that any terminal can show: bytes that are not UTF-8 and control characters become escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def require_utf8_name(path: str) -> None:
    """Raises RecipeError for a path that is not UTF-8: what is computed from its name would differ between machines."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(f"{printable(path)} has a name that is not UTF-8; rename it or take it out of data.source") from error


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Returns the stat result of `entry`, or of its target if it is a link; None for a broken or circular link, and for a file that
    was just removed. Raises SourceError for other errors."""
    try:
        return entry.stat()
    except OSError as error:
        if entry.is_symlink() or isinstance(error, FileNotFoundError):
            return None
        raise _unlisted(entry.path, error) from error


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unlisted(folder, error) from error
    return status.st_dev, status.st_ino


def _unlisted(path: str, error: OSError) -> SourceError:
    """Returns the error for a path that cannot be listed: to skip it silently would change the corpus."""
    return SourceError(f"{printable(path)} cannot be listed ({error.strerror}); put it right or take it out of data.source")
