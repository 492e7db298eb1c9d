"""summary.json says at every moment how the latest start ended, or that one is under way."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from bagualu.fault_tolerance import run_lock
from bagualu.trainer.output import summary
from bagualu.trainer.output.start import Start
from bagualu.trainer.process.failure import Failure
from tests.fault_tolerance.test_append_log import room_for
from tests.parity import small_recipe

DONE = {"ended": "done", "step": 4, "steps": 4, "loss": 1.5}
FAILURE = Failure(1, "step 6, backward", "RuntimeError: planned", 1.0, "error", 6)


def start_in(folder: Path, before: dict[str, Any] | None = None) -> Start:
    if before is not None:
        summary.write(folder, before)
    return Start(small_recipe(run__dir=str(folder), train__steps=8))


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.mark.parametrize("before", [None, DONE])
def test_a_start_is_running_until_it_fails(tmp_path: Path, before: dict[str, Any] | None) -> None:
    start = start_in(tmp_path, before)
    start.begin()
    running = content(tmp_path)
    assert (running["ended"], running["steps"], running.get("previous")) == ("running", 8, before)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5}\ngarbage\n')
    start.fail(FAILURE)
    failed = content(tmp_path)
    assert (failed["ended"], failed["step"], failed.get("previous")) == ("failed", 5, before)
    assert failed["failure"] == FAILURE.as_dict()
    assert summary.final(tmp_path) == (before or {})


def test_the_figures_of_the_last_start_that_had_some_outlive_many_that_fail(tmp_path: Path) -> None:
    summary.write(tmp_path, DONE)
    for _ in range(3):
        start = start_in(tmp_path)
        start.begin()
        start.fail(FAILURE)
    start_in(tmp_path).begin()  # and is killed
    assert content(tmp_path)["previous"] == DONE


@pytest.mark.parametrize("before", [None, DONE, {"ended": "failed", "failure": {}}])
def test_a_refused_recipe_leaves_the_files_as_they_were(tmp_path: Path, before: dict[str, Any] | None) -> None:
    start = start_in(tmp_path, before)
    if before:
        (tmp_path / "config.yaml").write_text("the recipe before")
    start.refuse()
    assert summary.read(tmp_path) == (before or {})
    start.save_recipe()
    assert "steps: 8" in (tmp_path / "config.yaml").read_text()
    start.begin()
    start.begin()  # a second generation of workers
    start.refuse()
    assert summary.read(tmp_path) == (before or {})
    assert sorted(path.name for path in tmp_path.iterdir()) == (["config.yaml", "summary.json"] if before else [])
    if before:
        assert (tmp_path / "config.yaml").read_text() == "the recipe before"


def test_asked_to_stop_before_the_first_step_is_stopped_and_hides_no_figures(tmp_path: Path) -> None:
    start = start_in(tmp_path, DONE)
    start.begin()
    start.fail(Failure(-1, "start", "asked to stop", 1.0, "stopped"))
    assert content(tmp_path)["ended"] == "stopped"
    assert summary.final(tmp_path) == DONE


def test_what_rank_0_wrote_stays(tmp_path: Path) -> None:
    start = start_in(tmp_path)
    start.begin()
    summary.write(tmp_path, DONE)
    start.finish({**DONE, "loss": 2.0})
    assert content(tmp_path) == DONE


def test_another_process_says_only_what_nobody_else_can(tmp_path: Path) -> None:
    other = start_in(tmp_path)
    with run_lock.hold(tmp_path):
        start_in(tmp_path).begin()
        other.fail_if_left(FAILURE)
        assert content(tmp_path)["ended"] == "running", "the process that holds the lock lives"
    other.fail_if_left(FAILURE)
    assert content(tmp_path)["ended"] == "failed"
    summary.write(tmp_path, DONE)
    other.fail_if_left(FAILURE)
    assert content(tmp_path) == DONE


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff", b"\0" * 64])
def test_a_damaged_file_ends_no_run(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "summary.json").write_bytes(damage)
    start_in(tmp_path).begin()
    assert content(tmp_path)["ended"] == "running"
    assert summary.final(tmp_path) == {}


def test_a_full_disk_costs_a_warning_and_nothing_that_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = start_in(tmp_path, DONE)
    with caplog.at_level(logging.WARNING), room_for(0):
        start.begin()
    assert "summary.json is not up to date: File too large" in caplog.text
    assert content(tmp_path) == DONE
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
