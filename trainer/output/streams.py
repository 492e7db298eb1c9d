"""Output streams that never end a run: they drop what cannot be written and replace what cannot be encoded.

A reader may leave (`bagualu train ... | head -1`), a terminal may be closed, the disk behind a redirected stream may be full, and
the terminal's encoding may lack characters. None of this is a reason to stop training, or to change an exit code.
"""

import codecs
import contextlib
import fcntl
import io
import os
import select
import sys
from typing import Any, TextIO

_ERRORS = "bagualu.replace"
"""Name under which the error handler `_replacement` is registered with Python's codecs."""
_OWN_CHOICES = ("ignore", "replace", "xmlcharrefreplace", "namereplace")
"""Error handlers that never raise. A stream has them only if the user asked for them (PYTHONIOENCODING), so they are kept."""
_LOOK_ALIKES = str.maketrans(dict.fromkeys("─━╸╺–—", "-") | dict.fromkeys("│┃", "|") | {"…": "...", "→": "->", "×": "x", "•": "*"})
"""ASCII replacements for the lines, bars and symbols that this program and rich print."""


class Forgiving(io.FileIO):
    """A file whose writes do not fail: bytes that cannot be written are dropped, and reported as written.

    Every write is attempted, so output is written again once a full disk has room.
    """

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            while (written := super().write(data)) is None:  # a non-blocking pipe that is full
                poll = select.poll()
                poll.register(self, select.POLLOUT)
                poll.poll()
            return written
        return memoryview(data).nbytes


def text(raw: io.RawIOBase, encoding: str = "utf-8", errors: str = _ERRORS, write_through: bool = False) -> TextIO:
    """Returns a text stream over `raw` that flushes at every line end and replaces characters that `encoding` lacks."""
    codecs.register_error(_ERRORS, _replacement)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors=errors, line_buffering=True, write_through=write_through
    )  # fmt: skip


def secure() -> None:
    """Makes writes to `sys.stdout` and `sys.stderr` never fail. Call it first in every process.

    A closed standard stream becomes /dev/null. Otherwise a file that is opened later could get its descriptor, and with it what C
    libraries print. Streams that are not the interpreter's own, e.g. a notebook's, are not changed.
    """
    for descriptor in (0, 1, 2):
        _fill(descriptor)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _secured(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _secured(sys.stderr, 2)


def _fill(descriptor: int) -> None:
    try:
        fcntl.fcntl(descriptor, fcntl.F_GETFD)
    except OSError:
        nothing = os.open(os.devnull, os.O_RDWR)
        if nothing != descriptor:
            os.dup2(nothing, descriptor)
            os.close(nothing)
        else:
            os.set_inheritable(descriptor, True)


def _secured(stream: TextIO | None, descriptor: int) -> TextIO:
    """Returns a stream over `descriptor` that never fails, with the encoding of `stream`. If `stream` is None, the descriptor was
    closed when Python started and may belong to a file by now; then the stream drops everything."""
    if stream is None:
        return text(Forgiving(os.devnull, "w"))
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    errors = stream.errors if stream.errors in _OWN_CHOICES else _ERRORS
    write_through = getattr(stream, "write_through", False)
    return text(Forgiving(descriptor, "w", closefd=False), stream.encoding, errors, write_through)


def _replacement(error: UnicodeError) -> tuple[str, int]:
    """A codec error handler. Returns what is written in place of characters that the stream's encoding lacks (ASCII look-alikes for
    drawing characters, backslash escapes for others), and the position at which to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = error.object[error.start : error.end].translate(_LOOK_ALIKES)
    return shown.encode("ascii", "backslashreplace").decode("ascii"), error.end
