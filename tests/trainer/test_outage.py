"""Storage that cannot be read when a run goes on is waited for, then it fails to be tried again: never damage, never step 0."""

import errno
import logging
import os
from collections import Counter
from dataclasses import replace
from io import FileIO
from pathlib import Path
from threading import current_thread
from typing import Any

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout import blocks
from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointStorageError, step_name
from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH
from bagualu.fault_tolerance.guard.verdict import Cause, GuardAction, GuardDecision
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.launch.workers.storage_probe import newest
from bagualu.trainer import loop
from bagualu.trainer import run as whole_run
from bagualu.trainer.process.failure import failure
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recovery import resume
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.standing import assert_same_run
from tests.trainer.test_run import recipe_in

STEPS, STOPPED = 6, 5
"""Checkpoints of steps 2, 4 and 5; the run goes on from the last."""
TRIES = 5


def recipe_on(folder: Path, **changes: object) -> Recipe:
    return recipe_in(folder, **{"checkpoint__keep": 9, "train__validate_every": 0, "restart__backoff_seconds": 0.0, **changes})


def train(communicator: Communicator, recipe: Recipe, stop_at: int = 0) -> dict[str, Any]:
    return whole_run.train(recipe, communicator, lambda: communicator.monitor.step == stop_at)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    run("simulated", 2, train, recipe_on(folder))
    return folder


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    run("simulated", 2, train, recipe_on(tmp_path / "run"), STOPPED)
    return tmp_path / "run"


def go_on(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = run("simulated", 2, train, recipe_on(folder, checkpoint__resume=True))[0]
    return summary


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Which they are and what is in them, but for the number of the start and what is said of it."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name not in (EPOCH, "ledger.jsonl")]
    return {path: (path.stat().st_ino, path.read_bytes()) for path in found}


class Outage:
    """The first `times` tries to read each of the checkpoints fail on each rank (or on one)."""

    def __init__(self, patch: pytest.MonkeyPatch, times: int, steps: tuple[int, ...], code: int, rank: int | None = None) -> None:
        self.times, self.names, self.code = times, [step_name(step) for step in steps], code
        self.thread = None if rank is None else f"rank-{rank}"
        self.seen: Counter[tuple[str, Path]] = Counter()
        self.patch = patch

    def strike(self, path: Path) -> None:
        who = current_thread().name
        if path.parent.name in self.names and who.startswith("rank-") and self.thread in (None, who):
            self.seen[who, path.parent] += 1
            if self.seen[who, path.parent] <= self.times:
                raise OSError(self.code, os.strerror(self.code), str(path))

    def of_open(self, name: str) -> None:
        original = os.open

        def opened(path: Any, *args: Any, **kwargs: Any) -> int:
            if str(path).endswith(name):
                self.strike(Path(path))
            return original(path, *args, **kwargs)

        self.patch.setattr(os, "open", opened)

    def of_read(self) -> None:
        outage = self

        class Failing(FileIO):
            def readinto(self, into: Any) -> int:
                path = Path(os.readlink(f"/proc/self/fd/{self.fileno()}"))
                if path.suffix == ".safetensors":
                    outage.strike(path)
                return super().readinto(into)

        self.patch.setattr(blocks, "FileIO", Failing)


ALL = (2, 4, 5)
MANIFESTS, SHARDS, READS = "manifests", "shards", "reads"


def begin(outage: Outage, where: str) -> None:
    if where == READS:
        outage.of_read()
    else:
        outage.of_open("manifest.json" if where == MANIFESTS else ".safetensors")


@pytest.mark.parametrize("where", [MANIFESTS, SHARDS, READS])
@pytest.mark.parametrize(("code", "rank"), [(errno.EIO, None), (errno.ESTALE, 1), (errno.ENOTCONN, 0)])
def test_an_outage_that_ends_costs_only_time(
    stopped: Path,
    straight: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
    code: int,
    rank: int,
) -> None:
    begin(Outage(monkeypatch, TRIES - 1, ALL, code, rank), where)
    with caplog.at_level(logging.WARNING):
        summary = go_on(stopped)
    assert summary["damaged"] == []
    assert [path.name for path in list_checkpoints(stopped / "checkpoints")] == [step_name(step) for step in (*ALL, STEPS)]
    assert_same_run(stopped, straight)
    waits = [record.getMessage() for record in caplog.records if "Trying again" in record.getMessage()]
    assert len(waits) == TRIES - 1
    assert all(step_name(STOPPED) in wait and os.strerror(code) in wait for wait in waits)


@pytest.mark.parametrize("where", [MANIFESTS, SHARDS, READS])
def test_an_outage_without_end_is_told_as_one_and_changes_nothing(
    stopped: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    before = files(stopped)
    with monkeypatch.context() as patch:
        begin(Outage(patch, 10**9, ALL, errno.EIO), where)
        with pytest.raises(CheckpointStorageError) as error:
            go_on(stopped)
    told = str(error.value)
    assert told.startswith(f"none of the 3 states of {stopped} can be read now (step-00000005: rank 0 ")
    assert told.count("Input/output error") == 3
    assert "nothing was changed" in told
    assert "\n" not in told.split("\non simulated rank")[0]
    assert failure(0, "load", error.value, 0.0).kind == "storage"
    assert files(stopped) == before
    go_on(stopped)
    assert_same_run(stopped, straight)


def test_what_is_damaged_while_the_rest_cannot_be_read_does_not_end_the_run_for_good(
    stopped: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stopped / "checkpoints" / step_name(4) / "manifest.json").write_bytes(b"{}")
    before = files(stopped)
    with monkeypatch.context() as patch:
        begin(Outage(patch, 10**9, (2, 5), errno.EIO), MANIFESTS)
        with pytest.raises(CheckpointStorageError, match="can be read now"):
            go_on(stopped)
    assert files(stopped) == before
    assert go_on(stopped)["damaged"] == []
    assert_same_run(stopped, straight)


def test_one_that_cannot_be_read_beside_others_that_can_is_set_aside(
    stopped: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(Outage(monkeypatch, 10**9, (5,), errno.EIO), SHARDS)
    content = {path.name: path.read_bytes() for path in (stopped / "checkpoints" / step_name(5)).iterdir()}
    (entry,) = go_on(stopped)["damaged"]
    assert (entry["checkpoint"], entry["used"]) == (step_name(5), step_name(4))
    assert "cannot be opened now (Input/output error)" in entry["problem"]
    assert {path.name: path.read_bytes() for path in (stopped / "checkpoints" / entry["set_aside"]).iterdir()} == content
    assert_same_run(stopped, straight)


def test_an_outage_that_ends_while_older_ones_are_tried_sets_nothing_aside(
    stopped: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest fails as often as it is tried; the one before it is read, and then the newest can be too."""
    begin(Outage(monkeypatch, TRIES, (5,), errno.EIO), MANIFESTS)
    summary = go_on(stopped)
    assert summary["damaged"] == []
    assert [path.name for path in list_checkpoints(stopped / "checkpoints")] == [step_name(step) for step in (*ALL, STEPS)]
    assert_same_run(stopped, straight)


def hidden(folder: Path) -> Path:
    return folder.rename(folder.with_name(f"{folder.name}-hidden"))


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_checkpoints_that_are_not_mounted_are_no_reason_to_begin_anew(stopped: Path, straight: Path, left: str) -> None:
    recipe = recipe_on(stopped, checkpoint__resume=True)
    away = hidden(stopped / "checkpoints")
    if left == "an empty folder":
        (stopped / "checkpoints").mkdir()
    before = files(stopped)
    with pytest.raises(
        RecipeError, match=r"holds a run, but its checkpoints are not there; see whether the storage of .* is mounted"
    ):
        preflight.check_run_directory(recipe)
    assert newest(recipe) == "its newest checkpoint, when its storage answers"
    with pytest.raises(CheckpointStorageError, match=rf"the run has begun there but {EPOCH} is missing; see whether .* mounted"):
        go_on(stopped)
    assert files(stopped) == before
    assert (stopped / "checkpoints").exists() == (left == "an empty folder")
    if left == "an empty folder":
        (stopped / "checkpoints").rmdir()
    away.rename(stopped / "checkpoints")
    preflight.check_run_directory(recipe)
    assert newest(recipe) == step_name(STOPPED)
    go_on(stopped)
    assert_same_run(stopped, straight)


def with_scratch(communicator: Communicator, recipe: Recipe, scratch: Path) -> dict[str, Any]:
    return whole_run.train(recipe, communicator, scratch=scratch)


def test_a_launch_remembers_that_its_run_had_begun_when_the_whole_run_directory_is_away(stopped: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    recipe = recipe_on(stopped, checkpoint__resume=True)
    run("simulated", 2, with_scratch, recipe, tmp_path / "scratch")
    away = hidden(stopped)
    with pytest.raises(CheckpointStorageError, match="the run has begun there"):
        run("simulated", 2, with_scratch, recipe, tmp_path / "scratch")
    assert not (stopped / "metrics.jsonl").exists()
    assert away.exists()


def test_a_run_directory_that_gives_errors_is_an_outage_on_every_rank(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(directory: Path) -> bool:
        if current_thread().name == "rank-1":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(directory))
        return True

    monkeypatch.setattr(RunDirectory, "has_begun", fail)
    with pytest.raises(CheckpointStorageError, match=r"rank 1: .* cannot be read now \(Stale file handle\)") as error:
        go_on(stopped)
    assert failure(0, "start", error.value, 0.0).kind == "storage"


def test_only_rank_0_decides_what_there_is_and_the_others_wait_to_see_it(
    stopped: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first rank 1 sees neither `.epoch` nor the newest checkpoint, as on a node whose network file system is behind."""
    stat, looks = Path.stat, Counter[str]()

    def stale(path: Path, **options: Any) -> Any:
        if current_thread().name == "rank-1" and path.name in (EPOCH, step_name(STOPPED)):
            looks[path.name] += 1
            if looks[path.name] < TRIES:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", stale)
    assert go_on(stopped)["damaged"] == []
    assert looks == {step_name(STOPPED): looks[step_name(STOPPED)]}
    assert looks[step_name(STOPPED)] >= TRIES
    assert_same_run(stopped, straight)


def test_a_stop_ends_the_pauses(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(Outage(monkeypatch, 10**9, ALL, errno.EIO), MANIFESTS)
    slept: list[float] = []
    monkeypatch.setattr(resume.time, "sleep", slept.append)
    recipe = recipe_on(stopped, checkpoint__resume=True, restart__backoff_seconds=3600.0)

    def asked(communicator: Communicator, recipe: Recipe) -> None:
        whole_run.train(recipe, communicator, lambda: communicator.rank == 1)

    with pytest.raises(CheckpointStorageError, match="can be read now"):
        run("simulated", 2, asked, recipe)
    assert max(slept) <= 1
    assert sum(slept) < 60


def test_the_way_back_in_a_run_waits_for_its_checkpoints_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback that cannot list them is no run without anything to go back to."""

    def spiking(state: Any, step: int, *args: Any) -> Any:
        result = train_step(state, step, *args)
        if step == 4:
            if state.mesh.at("world") == 0:
                hidden(tmp_path / "run" / "checkpoints")
            state.mesh.group("world").barrier()
            return replace(result, verdict=GuardDecision(GuardAction.ROLLBACK, Cause.NORM, text="a spike"))
        return result

    monkeypatch.setattr(loop, "train_step", spiking)
    with pytest.raises(CheckpointStorageError, match="see whether its storage is mounted") as error:
        run("simulated", 2, train, recipe_on(tmp_path / "run"))
    assert failure(0, "data", error.value, 0.0).kind == "storage"


def test_a_mount_that_is_stale_on_one_rank_when_checkpoints_are_looked_for_is_waited_for(
    stopped: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage = Outage(monkeypatch, 2, (), errno.ESTALE, rank=1)
    outage.names = ["checkpoints"]  # the folder of what is looked for
    original = Path.is_dir

    def is_dir(path: Path) -> bool:
        outage.strike(path)
        return original(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    assert go_on(stopped)["damaged"] == []
    assert outage.seen
    assert_same_run(stopped, straight)
