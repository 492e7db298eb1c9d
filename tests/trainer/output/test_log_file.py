"""What reaches a log of a stream that also draws a progress bar."""

import io
from pathlib import Path

import pytest

from bagualu.trainer.output.log_file import Copy, _open


def test_the_log_gets_finished_lines_in_their_last_state():
    stream, log = io.StringIO(), io.StringIO()
    copy = Copy(stream, log)
    for text in ("plain ", "line\n", "\rstep 1", "\rstep 2", "\x1b[2K\rstep 3\n", "a\r\nb"):
        copy.write(text)
    assert log.getvalue() == "plain line\nstep 3\na\n"
    assert stream.getvalue() == "plain line\n\rstep 1\rstep 2\x1b[2K\rstep 3\na\r\nb"
    assert copy.isatty() is False


def test_a_log_on_a_full_disk_drops_lines_and_raises_nothing():
    with _open(Path("/dev/full")) as log:
        copy = Copy(io.StringIO(), log)
        copy.write("one line\n" * 10_000)
        log.flush()
    with pytest.raises(OSError, match="No space"), open("/dev/full", "w") as plain:
        plain.write("so it is as full as it says")
