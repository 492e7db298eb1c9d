"""Atomic replacement of a file's content."""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces the content of `path` by `data`, atomically and with an fsync of the data: a reader sees either the old content or
    all of `data`.

    Raises OSError if that fails; then `path` is unchanged, and the temporary file beside it has been removed if possible.
    """
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        with new.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, path)
    except OSError:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise
