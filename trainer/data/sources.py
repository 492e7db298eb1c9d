"""Finds the files that `data.source` stands for."""

import os
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.config import STDLIB
from bagualu.trainer.data.listing import SourceError, TextFile, Tree, printable, require_utf8_name

# Test suites would double the time of preparation, tables of code points and generated help were not written by people, and
# installed packages differ between machines.
_STDLIB_SKIPPED = frozenset(
    {
        *("test", "tests", "idle_test", "lib2to3"),
        *("encodings", "pydoc_data"),
        *("site-packages", "dist-packages", "__pycache__"),
    }
)

_BUILD_RECORD = "_sysconfigdata"
"""Prefix of a generated module that records how this interpreter was built; it is full of this machine's paths."""


def find_files(source: str, apart: Collection[str] = ()) -> list[TextFile]:
    """Returns the files of `source` that are not empty, ordered by name. `apart`: folders to skip, e.g. the run's own.

    `stdlib` means the .py files of the running interpreter's standard library. A folder means every file below it, links followed,
    except in folders of runs or prepared corpora and where the name of the file or of a folder starts with a dot. Raises
    SourceError if `source` is missing, holds no files or cannot be listed, and RecipeError for a name that is not UTF-8, for a
    standard library without sources, and if `source` is itself the folder of a run or of prepared corpora.
    """
    if source == STDLIB:
        root = sysconfig.get_path("stdlib")
        tree = Tree(root, skipped=_STDLIB_SKIPPED, suffix=".py", follow=False)
        files = [file for file in tree.files() if not file.name.startswith(_BUILD_RECORD)]
        if not files:
            raise RecipeError(f"there are no sources of the standard library under {root}; give data.source=FOLDER")
    else:
        files = list(_given(source, apart))
        if not files:
            raise SourceError(f"data.source={source} holds no text; put UTF-8 text files there or give data.source=stdlib")
    return sorted(files, key=lambda file: file.name)


def require_files(source: str, apart: Collection[str] = ()) -> None:
    """Checks that the file or folder `source` exists, is not empty and can be read completely. Raises SourceError, RecipeError."""
    for file in find_files(source, apart):
        if not os.access(file.path, os.R_OK):
            raise SourceError(f"{printable(file.path)} cannot be read (Permission denied); make it readable or take it out of "
                              "data.source")  # fmt: skip


def _given(source: str, apart: Collection[str]) -> Iterator[TextFile]:
    root = Path(source)
    try:
        status = root.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceError(f"data.source={source} is not there; give a text file or folder that is, stdlib or random") from error
    except OSError as error:
        raise SourceError(f"data.source={source} cannot be read ({error.strerror}); put it right or give another") from error
    if root.is_file():
        require_utf8_name(str(root))
        if status.st_size:
            yield TextFile(str(root), root.name, status.st_size, status.st_mtime_ns)
    elif root.is_dir():
        yield from Tree(str(root), apart).files()
    else:
        raise SourceError(f"data.source={source} is neither a file nor a folder; give a text file or folder, stdlib or random")
