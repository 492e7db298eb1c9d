"""Test 24: a whole run of 4 ranks on storage that is read-only, is taken away, or never answers."""

import errno
import json
import os
import re
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.fault_tolerance.config import RestartConfig
from bagualu.fault_tolerance.run_directory import BEGUN, RunDirectory
from bagualu.launch import node
from bagualu.launch.cli import main
from bagualu.launch.workers import run as launch_run
from bagualu.launch.workers import storage_probe
from bagualu.launch.workers.restart_policy import Restarts, announcement
from bagualu.trainer.process.failure import Failure
from tests.launch.survival import FOUR, MOST_LOST, SMALL, finish, small
from tests.launch.warm import run_as_root
from tests.leftovers import Leftovers
from tests.mounts import can_mount
from tests.standing import assert_names_rank_phase_and_cause, assert_stood

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
pytestmark = [LINUX, pytest.mark.timeout(300)]
WORDS = [*FOUR, "checkpoint.keep=9", "log.progress=off"]
SILENT = "the storage has not answered for checkpoint.timeout_seconds"
STALLS = [*WORDS, "checkpoint.timeout_seconds=1", "restart.backoff_seconds=0"]
SYNC = "checkpoint.async=false"
OWED = 7
"""Steps from the last save that storage took, of step 2 at the earliest, to the end, where the last one is owed."""


@pytest.fixture(scope="module")
def reference(undisturbed, tmp_path_factory):
    return undisturbed(small(tmp_path_factory.mktemp("unused"), *WORDS), "gloo")


def saved(folder: Path) -> list[int]:
    """Steps of the checkpoints, each of which is whole."""
    found = list_checkpoints(folder / "checkpoints")
    assert [verify(path) for path in found] == [[]] * len(found)
    return [int(path.name.removeprefix("step-")) for path in found]


def last_line(err: str) -> str:
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize(("calls", "background"), [("write-all", "false"), pytest.param("fsync-2", "true", marks=pytest.mark.slow)])
def test_storage_that_never_answers_costs_the_saves_and_the_run_ends_by_itself(
    start, reference, calls: str, background: str
) -> None:
    """From step 5 on: the steps go on, the last save is owed, a new start finds the same, and then it is over; no crash loop."""
    words = [*SMALL, *STALLS, f"checkpoint.async={background}", f"run.name={calls}-5", "restart.limit=1"]
    run = start(*words, entrypoint="lost_storage:train")
    code, _, err = run.end(at_most_seconds=120)
    assert code == 1, err
    assert f"step 9 was not saved: rank {calls[-1] if calls[-1].isdigit() else 0}" in err
    assert SILENT in last_line(err)
    assert_names_rank_phase_and_cause(last_line(err))
    assert "(after 1 restarts; restart.limit=1)" in last_line(err)
    assert saved(run.folder) in ([2], [2, 4])  # in the background step 4 may be under way
    (run.folder.parent / "stalled").unlink()
    finish(run.folder, *WORDS)
    assert_stood(run.folder, reference, OWED)


@pytest.mark.slow
def test_storage_that_answers_again_gets_the_run(start, reference) -> None:
    """While it is being started anew, because its last save was not taken."""
    run = start(*SMALL, *STALLS, SYNC, "run.name=write-all-5.again-3", "restart.limit=2", entrypoint="lost_storage:train")
    code, _, err = run.end(at_most_seconds=120)
    assert code == 0, err
    assert err.count("; restart ") == 2, err
    assert_stood(run.folder, reference, OWED)
    assert saved(run.folder)[-1] == 9


def test_a_run_that_is_asked_to_stop_while_its_storage_is_silent_ends_and_says_not_saved(start) -> None:
    run = start(*SMALL, *STALLS, SYNC, "train.steps=100000", "run.name=write-all-5", entrypoint="lost_storage:train")
    metrics = run.folder / "metrics.jsonl"
    run.until(lambda: metrics.exists() and "checkpoint_error" in metrics.read_text())
    os.kill(run.process.pid, signal.SIGTERM)
    code, _, err = run.end(at_most_seconds=60)
    assert code == 1, err
    assert "not saved yet" in err
    assert re.search(rf"step \d+ was not saved: rank 0.*: {SILENT}", last_line(err)), err
    assert "; restart " not in err
    assert saved(run.folder) == [2, 4]


@pytest.mark.slow
def test_a_rank_that_gets_no_answer_from_storage_when_a_run_goes_on_is_named(start, reference) -> None:
    hang = ["restart.hang_seconds=15", "restart.long_hang_seconds=15", "restart.limit=1"]
    run = start(*SMALL, *STALLS, *hang, SYNC, "run.name=read-2-5.kill-5", entrypoint="lost_storage:train")
    code, _, err = run.end(at_most_seconds=120)
    assert code == 1, err
    assert "bagualu: failed: rank 2, " in last_line(err), err
    assert "stood still" in last_line(err)
    assert saved(run.folder) == [2, 4]
    (run.folder.parent / "stalled").unlink()
    finish(run.folder, *WORDS)
    assert_stood(run.folder, reference, MOST_LOST)


@pytest.mark.parametrize("name", ["metrics.jsonl", "logs/rank-1.log", "checkpoints/.epoch"])
def test_a_pipe_in_place_of_a_file_is_refused_before_anybody_waits_for_its_reader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    assert main(["train", *SMALL, *WORDS, f"run.dir={tmp_path}"], "lost_storage:train") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"bagualu: error: {tmp_path / name} is a pipe or a socket, which whoever writes there would wait for; remove"
    )


def test_the_launcher_does_not_wait_for_ever_for_a_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(storage_probe, "_CHECK_SECONDS", 0.2)
    monkeypatch.setattr(storage_probe, "_LOOK_SECONDS", 0.2)
    for owner, name in ((storage_probe, "latest"), (RunDirectory, "has_begun")):
        monkeypatch.setattr(owner, name, lambda *_: answers.wait() and None)
    assert main(["train", *SMALL, *WORDS, f"run.dir={tmp_path}"], "lost_storage:train") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"bagualu: error: run.dir={tmp_path} has not answered for 0.2 s; see whether its storage hangs, or give another"
    )
    assert storage_probe.newest(small(tmp_path, *WORDS)) == "its newest checkpoint, when its storage answers"
    answers.set()
    assert storage_probe.newest(small(tmp_path, *WORDS)) is None


def in_namespace(folder: Path, what: str, leftovers: Leftovers) -> tuple[dict[str, Any], str]:
    """What the program found, and what it said."""
    here = Path(__file__).parents[1]
    done = run_as_root("tests.launch.lost_mount", [str(folder), what], "mounts", leftovers.environment, here)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text()), done.stderr


MOUNTS = pytest.mark.skipif(not can_mount(), reason="needs `unshare -rm` with mounts (root, or user namespaces)")


def place_of(folder: Path) -> Path:
    """The run as it is seen from outside of the namespace: its checkpoints lie where they were mounted from."""
    (folder / "run" / "checkpoints").rmdir()
    (folder / "stored").rename(folder / "run" / "checkpoints")
    return folder / "run"


@MOUNTS
def test_checkpoints_whose_mount_goes_and_comes_back_cost_the_saves_between(
    tmp_path: Path, reference: Path, leftovers: Leftovers
) -> None:
    found, err = in_namespace(tmp_path, "remount", leftovers)
    assert found["code"] == 0, err
    assert re.search(r"step 6 was not saved: rank \d.*see whether its storage is still mounted", err), err
    assert "killed by SIGKILL" in err
    assert "restart 1 of 3 in 0 s, from its newest checkpoint, when its storage answers" in err
    assert "see whether its storage is mounted; make it writable or give another run.dir; restart 2 of 3" in err
    run = place_of(tmp_path)
    assert saved(run) == [2, 4, 6, 8, 9]
    assert_stood(run, reference, MOST_LOST)


@MOUNTS
def test_a_run_whose_checkpoints_stay_away_ends_and_never_begins_anew(
    tmp_path: Path, reference: Path, leftovers: Leftovers
) -> None:
    found, err = in_namespace(tmp_path, "unmount", leftovers)
    assert (found["code"], found["again"], found["resumed"]) == (1, 2, 0), err
    failed = next(line for line in err.splitlines() if line.startswith("bagualu: failed"))
    assert_names_rank_phase_and_cause(failed)
    assert "see whether its storage is mounted" in failed
    assert "(after 1 restarts; restart.limit=1)" in failed
    assert re.search(r"bagualu: error: .*run holds a run, but its checkpoints are not there; see whether", err), err
    assert found["below"] == []
    assert found["metrics"] == 9
    run = place_of(tmp_path)
    assert saved(run) == [2, 4, 6, 8, 9]
    assert_stood(run, reference, OWED)


@MOUNTS
def test_a_read_only_run_directory_is_refused_in_one_line_before_anything_starts(tmp_path: Path, leftovers: Leftovers) -> None:
    found, err = in_namespace(tmp_path, "read-only", leftovers)
    assert (found["first"], found["resumed"], found["starts"]) == (0, 0, 1), err
    assert found["codes"] == [2] * 5
    said = err.split("-- refused\n")[1:]
    said[-1] = said[-1].split("-- resumed\n")[0]
    for text, place in zip(said, ("run", "run/checkpoints"), strict=True):
        for line in text.splitlines():
            assert re.match(rf"bagualu: error: .*{place}.*(cannot be written|already holds a run)", line), err
        assert len(text.splitlines()) == (3 if place == "run" else 2)
        assert "cannot be written" in text


def test_a_run_directory_that_is_away_is_never_advised_to_be_removed(tmp_path: Path) -> None:
    """The launch knows that its run had begun; and an outage says little of what there is."""
    recipe, loss = small(tmp_path / "run", *WORDS), Failure(0, "start", "StorageError: away", 0.0)
    assert "remove" in launch_run._advice(recipe, loss, begun=False)
    assert not storage_probe.begun(tmp_path)
    (tmp_path / BEGUN).touch()
    assert storage_probe.begun(tmp_path)
    for failure, begun in ((loss, True), (replace(loss, kind="storage"), True), (replace(loss, kind="storage"), False)):
        advice = launch_run._advice(recipe, failure, begun)
        assert "go on with checkpoint.resume=true" in advice
        assert "remove" not in advice
    restarts = Restarts(RestartConfig())
    line = announcement(restarts.decide(loss), restarts, recipe, begun=True)
    assert line.endswith("from its newest checkpoint, when its storage answers")


@pytest.mark.parametrize("command", ["train", "node"])
def test_a_run_directory_that_gives_errors_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(tmp_path))

    monkeypatch.setattr(RunDirectory, "has_begun", fail)
    words = [*SMALL, *WORDS, f"run.dir={tmp_path}"]
    if command == "train":
        code = main(["train", *words])
    else:
        code = node.main(["--meet", "127.0.0.1:29400", "--id", "x", "checkpoint.resume=true", *words])
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bagualu: error: run.dir={tmp_path} cannot be read (Stale file handle: ")
