"""Streams that take whatever is printed."""

import fcntl
import io
import logging
import os
import subprocess
import sys
import threading
import time
import warnings

import pytest
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bagualu.trainer.output import streams
from bagualu.trainer.output.log_file import Copy
from bagualu.trainer.output.progress import Progress, summary_text
from tests.broken_streams import KINDS, broken


def stream(descriptor, encoding="utf-8"):
    return streams.text(streams.Forgiving(descriptor, "w", closefd=False), encoding)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_is_printed_to_a_broken_stream_raises(kind, tmp_path, monkeypatch):
    with broken(kind) as descriptor, (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stdout", Copy(stream(descriptor), log))
        monkeypatch.setattr(sys, "stderr", Copy(stream(descriptor), log))
        print("a line\n" * 10_000, flush=True)
        warnings.showwarning(UserWarning("a warning"), UserWarning, __file__, 1)
        logging.getLogger("bagualu").warning("a record of the log")
        Console().print(Table("a", box=SIMPLE_HEAD))
        progress = Progress(2, mode="bar", stream=sys.stderr)
        progress.write({"step": 1, "loss": 1.0})
        progress.close()
        assert (sys.stdout.buffer.write(b"bytes"), sys.stdout.flush()) == (5, None)
        sys.stdout.buffer.close()
    assert (tmp_path / "log").read_text().startswith("a line\na line\n")


def test_a_disk_that_has_room_again_gets_what_is_written_then():
    reader, writer = os.pipe()
    saved = os.dup(writer)
    with broken("full disk") as full:
        os.dup2(full, writer)
    out = stream(writer)
    print("lost", file=out)
    os.dup2(saved, writer)
    print("kept", file=out)
    assert os.read(reader, 100) == b"kept\n"
    for descriptor in (reader, writer, saved):
        os.close(descriptor)


def test_a_pipe_that_does_not_block_loses_nothing_while_it_is_full():
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, fcntl.fcntl(writer, fcntl.F_GETFL) | os.O_NONBLOCK)
    long = "x" * 300_000 + "\n"
    thread = threading.Thread(target=lambda: print(long, end="", file=stream(writer)))
    thread.start()
    time.sleep(0.05)  # it is full by now, or will be
    seen = b""
    while len(seen) < len(long):
        seen += os.read(reader, 65536)
    thread.join()
    os.close(reader)
    os.close(writer)
    assert seen.decode() == long


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "shift_jis", "utf-8", "utf-16"])
def test_a_summary_and_names_are_written_in_any_encoding(encoding):
    raw = io.BytesIO()
    out = streams.text(raw, encoding)
    print(summary_text({"step": 4, "steps": 4, "run_dir": "runs/café-\udcff"}), file=out)
    shown = raw.getvalue().decode(encoding)
    assert shown.splitlines()[0] == "done: step 4/4"
    assert shown.splitlines()[1] in ("─" * 14, "-" * 14)
    assert shown.splitlines()[2] in ("run  runs/café-\\udcff", "run  runs/caf\\xe9-\\udcff")


CHOICE = """
import sys
from bagualu.trainer.output import streams
streams.secure()
streams.secure()
print(sys.stdout.encoding, sys.stdout.errors, sys.stderr.encoding)
print('é')
"""


@pytest.mark.parametrize(
    ("choice", "printed"),
    [
        ("latin-1:ignore", "iso8859-1 ignore iso8859-1\n\xe9\n"),
        ("ascii:xmlcharrefreplace", "ascii xmlcharrefreplace ascii\n&#233;\n"),
    ],
)
def test_the_encoding_and_the_error_handler_that_somebody_chose_stay(choice, printed):
    environment = {**os.environ, "PYTHONIOENCODING": choice}
    done = subprocess.run([sys.executable, "-c", CHOICE], env=environment, capture_output=True, check=True)
    assert done.stdout.decode("latin-1") == printed


def test_a_stream_that_is_not_the_interpreters_own_is_left_alone(monkeypatch):
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    streams.secure()
    assert sys.stdout is own
