"""Sends a worker's output to its log file, and that of rank 0 to the terminal too."""

import os
import re
import sys
from pathlib import Path
from typing import Any, TextIO, cast

from bagualu.trainer.output import streams

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def redirect_to_log(path: Path) -> None:
    """Appends all output of this process, including that of C libraries, to the log file `path` and no longer to the terminal."""
    log = _open(path)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = (streams.text(streams.Forgiving(descriptor, "w", closefd=False)) for descriptor in (1, 2))


def copy_to_log(path: Path, quiet_stdout: bool = False) -> int:
    """Appends what Python prints to the log file `path` as well, line by line. Returns the file descriptor of the log.

    With quiet_stdout, output for stdout goes to stderr.
    """
    log = _open(path)
    if quiet_stdout:
        os.dup2(2, 1)
    sys.stdout = cast(TextIO, Copy(sys.stdout, log))
    sys.stderr = cast(TextIO, Copy(sys.stderr, log))
    return log.fileno()


def _open(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return streams.text(streams.Forgiving(path, "a"))


class Copy:
    """A text stream that behaves like `stream`, and also appends finished lines to `log`.

    A progress bar redraws its line with carriage returns and escape codes; the log gets only the last state of such a line.
    """

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        *finished, self._line = (self._line + text).split("\n")
        for line in finished:
            shown = _ESCAPES.sub("", line).rstrip("\r")
            self._log.write(shown.rsplit("\r", 1)[-1] + "\n")
        self._line = self._line[-10_000:] if "\r" not in self._line else self._line[self._line.rindex("\r") :]
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
