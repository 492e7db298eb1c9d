"""Saving in the background through whole runs: the same run, whatever becomes of its saves; only the last one is owed."""

import errno
import json
import math
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import latest, list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.fault_tolerance.ledger.events import read
from bagualu.trainer.process.failure import failure
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recovery import saving
from tests.conftest import Undisturbed
from tests.harness import BACKENDS, ON_GPU, WorkerFailed, run
from tests.parity import small_recipe
from tests.standing import assert_same_samples, assert_same_state, assert_stood, go_on, train_noting_samples

STEPS = 8
SAME = ("step", "loss", "grad_norm", "lr", "tokens")


def recipe_in(folder: Path, **changes: object) -> Recipe:
    defaults: dict[str, object] = {
        "run__dir": str(folder), "train__steps": STEPS, "train__validation_sequences": 0, "log__progress": "off",
        "checkpoint__every": 2, "checkpoint__asynchronous": True, "parallel__data": 2, "data__global_batch": 4, "model__layers": 2,
    }  # fmt: skip
    return small_recipe(**{**defaults, **changes})


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[list[Any]]:
    return [[line[key] for key in SAME] for line in metrics(folder)]


def stored(path: Path | None) -> dict[str, bytes]:
    assert path is not None
    assert verify(path) == []
    return {file.name: file.read_bytes() for file in path.glob("rank-*")}


@pytest.fixture
def straight(tmp_path: Path, undisturbed: Undisturbed) -> Path:
    return undisturbed(recipe_in(tmp_path), "simulated")


@pytest.mark.parametrize("backend", [*BACKENDS, ON_GPU])
def test_in_the_background_or_not_it_is_the_same_run(tmp_path: Path, backend: str) -> None:
    found = {}
    for name, asynchronous in (("background", True), ("waiting", False)):
        recipe = recipe_in(tmp_path / name, checkpoint__asynchronous=asynchronous)
        summary = run(backend, 2, go_on, recipe)[0]
        assert summary["checkpoints_failed"] == 0
        assert summary["checkpoint_seconds"] > 0
        assert summary["checkpoint"].endswith(f"step-{STEPS:08d}")
        found[name] = curve(tmp_path / name), stored(latest(tmp_path / name / "checkpoints"))
        seconds = [line["checkpoint_seconds"] for line in metrics(tmp_path / name)]
        assert sum(seconds) <= summary["checkpoint_seconds"]
        assert seconds[0] == 0
        assert seconds[2] > 0  # step 2 was saved after its line
        saved = {event.step: event.seconds for event in read(tmp_path / name) if event.what == "saved"}
        assert list(saved) == [2, 4, 6, 8]
        assert all(taken is not None and 0 < taken < 60 for taken in saved.values())
    assert found["background"] == found["waiting"]


def test_going_on_from_what_was_saved_in_the_background_is_exact(tmp_path: Path, straight: Path) -> None:
    folder = tmp_path / "resumed"
    run("simulated", 2, go_on, recipe_in(folder, checkpoint__keep=9))
    for path in list_checkpoints(folder / "checkpoints")[2:]:
        path.rename(path.with_name("away-" + path.name))
    newest = latest(folder / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000004"
    run("simulated", 2, go_on, recipe_in(folder, checkpoint__resume=True))
    assert_stood(folder, straight, 0)


def failing_writes(patch: pytest.MonkeyPatch, rank: int, step: int) -> None:
    original = os.write

    def write(descriptor: int, data: Any) -> int:
        if threading.current_thread().name == f"checkpoint-writer-{rank}":
            folder = Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent.name
            if f"step-{step:08d}" in folder:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(descriptor, data)

    patch.setattr(os, "write", write)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_on_the_way_is_told_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, straight: Path, asynchronous: bool
) -> None:
    failing_writes(monkeypatch, 1, 4)
    folder = tmp_path / "run"
    summaries = run("simulated", 2, go_on, recipe_in(folder, checkpoint__keep=9, checkpoint__asynchronous=asynchronous))
    assert [summary["checkpoints_failed"] for summary in summaries] == [1, 1]
    assert [path.name[-1] for path in list_checkpoints(folder / "checkpoints")] == ["2", "6", "8"]
    told = [line["checkpoint_error"] for line in metrics(folder) if "checkpoint_error" in line]
    assert len(told) == 1
    assert told[0].startswith("step 4 was not saved: rank 1: OSError: [Errno 5] Input/output error")
    warnings = [record.getMessage() for record in caplog.records if "not saved" in record.getMessage()]
    assert warnings == [f"{told[0]}; training goes on"]
    assert_stood(folder, straight, 0)


def test_the_last_save_is_owed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: Path) -> None:

    def attempt(communicator: Communicator, recipe: Recipe) -> str:
        with pytest.raises(CheckpointError) as error:
            go_on(communicator, recipe)
        return str(error.value)

    with monkeypatch.context() as patch:
        failing_writes(patch, 1, STEPS)
        (message,) = set(run("simulated", 2, attempt, recipe_in(tmp_path)))
    assert message.startswith(f"step {STEPS} was not saved: rank 1: OSError: [Errno 5]")
    assert not (tmp_path / "summary.json").exists()
    newest = latest(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{STEPS - 2:08d}"
    assert len(metrics(tmp_path)) == STEPS
    run("simulated", 2, go_on, recipe_in(tmp_path, checkpoint__resume=True))
    assert_stood(tmp_path, straight, 2)


def test_a_run_directory_that_cannot_be_written_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")

    def attempt(communicator: Communicator, recipe: Recipe) -> str:
        with pytest.raises(RecipeError, match=r"checkpoints cannot be written: .*; make it writable or give"):
            go_on(communicator, recipe)
        return "refused"

    assert run("simulated", 2, attempt, recipe_in(tmp_path)) == ["refused"] * 2


@pytest.mark.parametrize("notices", [False, True])
def test_a_run_that_lost_its_directory_to_a_later_start_does_not_commit(
    tmp_path: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch, notices: bool
) -> None:
    """Where the lock does not reach: a second start, while the first trains on. Who was away for long looks before it writes."""
    monkeypatch.setattr(saving, "_AWAY_SECONDS", 0.0 if notices else math.inf)
    begun, recipe = threading.Event(), recipe_in(tmp_path, train__steps=4, checkpoint__every=1, parallel__data=1)

    def first(communicator: Communicator, recipe: Recipe) -> str:
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            if asked == 3:
                begun.set()
                other.join()
            return False

        with pytest.raises(CheckpointError) as error:
            train_noting_samples(recipe, communicator, stop)
        assert failure(0, "write", error.value, 0.0).kind == "final"  # a restart would take the run from the second
        return str(error.value)

    def second() -> None:
        begun.wait()
        resumed = replace(recipe, checkpoint=replace(recipe.checkpoint, resume=True))
        outcome.extend(run("simulated", 1, go_on, resumed))

    outcome: list[dict[str, Any]] = []
    other = threading.Thread(target=second)
    other.start()
    (message,) = run("simulated", 1, first, recipe)
    assert ("step 4 was not saved: rank 0: " in message) != notices
    assert "belongs to a later start of this run (number 2, this one is 1)" in message
    assert (outcome[0]["ended"], outcome[0]["step"]) == ("done", 4)
    assert verify(tmp_path / "checkpoints" / "step-00000004") == []
    assert_same_state(tmp_path, undisturbed(recipe, "simulated"))
    assert_same_samples(tmp_path, undisturbed(recipe, "simulated"))
    lines = [line["step"] for line in metrics(tmp_path)]
    assert lines == [1, 2, 3, 4] if notices else lines[:4] == [1, 2, 3, 4]  # the first one, which has lost, still writes its own


class DieAtSecond:
    """An observer that kills its process when it comes to `point` for the second time: in the save of step 4."""

    def __init__(self, point: str) -> None:
        self.point, self.times = point, 0

    def at(self, point: str, step: int) -> None:
        self.times += point == self.point
        if self.times == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def waits(self, what: str | None) -> None:
        return None


def dying(communicator: Communicator, recipe: Recipe, point: str) -> None:
    if communicator.rank == 0:
        communicator.monitor.observers.append(DieAtSecond(point))
    go_on(communicator, recipe)


@pytest.mark.parametrize(("point", "newest"), [("commit", 2), ("prune", 4)])
def test_rank_0_killed_before_the_commit_and_right_after_it(tmp_path: Path, straight: Path, point: str, newest: int) -> None:
    """Tests 3 and 4: between durability and commit the step stays invisible; right after the commit it loads."""
    recipe = recipe_in(tmp_path / "run")
    with pytest.raises(WorkerFailed):
        run("gloo", 2, dying, recipe, point)
    found = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert found[-1].name == f"step-{newest:08d}"
    assert verify(found[-1]) == []
    run("simulated", 2, go_on, recipe_in(tmp_path / "run", checkpoint__resume=True))
    assert_stood(tmp_path / "run", straight, 4)
