"""Output streams that cannot be written, or cannot encode what is written: the command ends as it would with good streams."""

import json
import os
import subprocess
import sys

import pytest

from tests.broken_streams import KINDS, broken

SCHEDULE = ("schedule", "name=1f1b", "stages=2", "micro_batches=4")
PROGRAM = "import sys; from bagualu.launch.cli import main; sys.exit(main())"


def command(leftovers, *words, environment=(), **streams):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], env={**leftovers.environment, **dict(environment)}, **streams
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (("train", "--help"), 0, b""),
        ((*SCHEDULE, "--json"), 0, b""),
        (("train", "recipe=no_such"), 2, b"bagualu: error: "),
        (("trian",), 2, b"bagualu: error: "),
    ],
)
def test_a_command_whose_stdout_is_broken_ends_as_with_a_good_one(leftovers, kind, words, code, error):
    with broken(kind) as stdout:
        done = command(leftovers, *words, stdout=stdout, stderr=subprocess.PIPE)
    assert done.returncode == code
    assert done.stderr.startswith(error)
    assert len(done.stderr.splitlines()) == len(error.splitlines())


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_whose_stderr_is_broken_too_keeps_its_exit_code(leftovers, kind):
    with broken(kind) as stream:
        assert command(leftovers, "trian", stdout=stream, stderr=stream).returncode == 2
        assert command(leftovers, *SCHEDULE, stdout=stream, stderr=stream).returncode == 0


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_a_command_without_streams_keeps_its_exit_code_and_opens_no_file_as_a_stream(leftovers, tmp_path, closed):
    """A file that got the number of stdout would get what libraries print."""
    redirect = " ".join(f"{number}>&-" for number in closed)
    words = " ".join(SCHEDULE)
    line = f"{sys.executable} -m bagualu.launch.cli {words} out={tmp_path}/picture.svg {redirect}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=leftovers.environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert (done.stdout == "") is (1 in closed)
    assert (tmp_path / "picture.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(one, marks=pytest.mark.slow) for one in ("latin-1", "cp1252")), "cp037"]
)
def test_a_recipe_is_printed_and_refused_in_any_encoding(leftovers, encoding):
    def printed(*words):
        done = command(leftovers, "train", *words, capture_output=True, environment={"PYTHONIOENCODING": encoding})
        return done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)

    name = 'run.name="café-数据"'
    code, out, err = printed("--cfg", "job", name)
    assert (code, err) == (0, "")
    assert "name: caf\\xe9-\\u6570\\u636e" in out if encoding == "ascii" else "name: café-\\u6570\\u636e" in out
    code, out, err = printed("--cfg", "job", name, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["run"]["name"] == "café-数据"
    code, out, err = printed('data.source="数据"')
    assert (code, out) == (2, "")
    assert err.startswith("bagualu: error: data.source=\\u6570\\u636e")
    assert err.endswith("\n")


def test_a_run_whose_streams_break_goes_on_and_ends_as_if_they_were_there(start):
    with broken("pipe without a reader") as stderr:
        run = start("train.steps=30", "parallel.data=2", "parallel.pipeline=1", stderr=stderr)
    run.process.stdout.close()
    assert run.process.wait(60) == 0
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 30


def test_a_run_whose_terminal_is_closed_stops_as_the_hang_up_asks(start):
    terminal, stderr = os.openpty()
    run = start("parallel.data=2", "parallel.pipeline=1", stderr=stderr)
    os.close(stderr)
    run.started(ranks=2)
    os.close(terminal)
    run.process.stdout.close()
    run.process.send_signal(1)
    assert run.process.wait(60) == 75
