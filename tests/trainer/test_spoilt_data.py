"""Test 29 under a running job: its corpus is cut short, overwritten or replaced while it reads. No wrong sample is learnt."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bagualu.comm.errors import RecipeError, StorageError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.trainer.data import prepared
from bagualu.trainer.data.prepared import DataError
from bagualu.trainer.process.failure import failure
from bagualu.trainer.recipe.config import Recipe
from tests.conftest import Undisturbed
from tests.harness import run
from tests.standing import assert_stood, figures, train_noting_samples
from tests.trainer.test_run import STEPS, recipe_in

STEP = 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 70,000 tokens: the file that they make has several blocks."""
    folder = tmp_path_factory.mktemp("spoilt") / "text"  # its cache, beside it, is that of no other module
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):
        letters = generator.integers(97, 123, 50_000)
        letters[generator.random(50_000) < 0.2] = 32
        (folder / f"{number}.txt").write_bytes(letters.astype(np.uint8).tobytes())
    return folder


def recipe_on(folder: Path, text: Path, **changes: object) -> Recipe:
    defaults: dict[str, object] = {
        "data__source": str(text), "data__cache": str(text.parent / "cache"), "model__vocab": 400, "data__sequence_length": 16,
        "checkpoint__every": 2, "checkpoint__asynchronous": False, "data__workers": 0,
    }  # fmt: skip
    return recipe_in(folder, **{**defaults, **changes})


def tokens_of(recipe: Recipe) -> Path:
    (path,) = Path(recipe.data.cache or "").glob("*/train.bin")
    return path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def other(path: Path) -> bytes:
    """Its tokens in another order: each is one, and there are as many."""
    return np.frombuffer(path.read_bytes(), np.uint16)[::-1].tobytes()


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(other(path))


def replace(path: Path) -> None:
    (path.parent / "new").write_bytes(other(path))
    (path.parent / "new").replace(path)


class Spoiler:
    """An observer that spoils the data as the step begins, before any rank reads its samples."""

    def __init__(self, communicator: Communicator, path: Path, how: Any) -> None:
        self.communicator, self.path, self.how = communicator, path, how

    def at(self, point: str, step: int) -> None:
        if self.how and (point, step) == ("data", STEP):
            if self.communicator.rank == 0:
                self.how(self.path)
            self.how = None
            self.communicator.world.barrier()

    def waits(self, what: str | None) -> None:
        return None


def train(communicator: Communicator, recipe: Recipe, how: Any = None, stop_at: int = 0) -> dict[str, Any]:
    """A run, stopped in step `stop_at`; the error it ends with says the step."""
    if how:
        communicator.monitor.observers.append(Spoiler(communicator, tokens_of(recipe), how))
    try:
        return train_noting_samples(recipe, communicator, lambda: communicator.monitor.step == stop_at)
    except DataError as error:
        error.add_note(f"step {communicator.monitor.step}")
        raise


@pytest.mark.parametrize(("how", "said"), [(cut, "was cut short while"), (overwrite, "was changed while")])
def test_a_shard_spoilt_under_a_run_ends_it_at_one_step_whatever_the_layout(
    tmp_path: Path, text: Path, undisturbed: Undisturbed, how: Any, said: str
) -> None:
    straight = {world: undisturbed(recipe_on(tmp_path, text, parallel__data=world), "simulated") for world in (1, 2, 4)}
    path = tokens_of(recipe_on(tmp_path, text))
    good = path.read_bytes()
    for world in (1, 2, 4):
        recipe = recipe_on(tmp_path / str(world), text, parallel__data=world)
        expected = rf"^sequence \d+ of data\.source={text} is lost: {path} {said} it was in use.*; start again, which prepares"
        with pytest.raises(DataError, match=expected) as error:
            run("simulated", world, train, recipe, how)
        assert error.value.__notes__[0] == f"step {STEP}"
        assert len(figures(tmp_path / str(world))) == STEP - 1
        (checkpoint,) = list_checkpoints(tmp_path / str(world) / "checkpoints")
        assert (checkpoint.name, verify(checkpoint)) == ("step-00000002", [])
        if world > 1:  # put back by hand; else the start prepares it anew
            path.write_bytes(good)
        run("simulated", world, train, recipe_on(tmp_path / str(world), text, parallel__data=world, checkpoint__resume=True))
        assert path.read_bytes() == good
        assert_stood(tmp_path / str(world), straight[world], 1)


def test_another_shard_in_its_place_is_not_read_by_the_run_and_noticed_by_the_next(
    tmp_path: Path, text: Path, undisturbed: Undisturbed, caplog: pytest.LogCaptureFixture
) -> None:
    straight = undisturbed(recipe_on(tmp_path, text), "simulated")
    path = tokens_of(recipe_on(tmp_path, text))
    good = path.read_bytes()
    run("simulated", 2, train, recipe_on(tmp_path / "run", text), replace)
    assert_stood(tmp_path / "run", straight, 0)
    assert path.read_bytes() != good
    assert not caplog.text
    run("simulated", 2, train, recipe_on(tmp_path / "run", text, train__steps=STEPS + 2, checkpoint__resume=True))
    assert path.read_bytes() == good
    assert "do not match its fingerprint" in caplog.text


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Which they are, and what is in them."""
    return {path: (path.stat().st_ino, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lost", ["source", "cache"])
def test_data_that_is_away_is_waited_for_by_a_run_that_goes_on_and_refused_at_its_beginning(
    tmp_path: Path, text: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Away: a source that is not mounted, a cache that gives input/output errors. What is in the cache is not touched."""
    source, cache = tmp_path / "text", tmp_path / "cache"
    shutil.copytree(text, source)
    words: dict[str, object] = {"data__source": str(source), "data__cache": str(cache)}
    straight = undisturbed(recipe_on(tmp_path, text, **words), "simulated")
    run("simulated", 2, train, recipe_on(tmp_path / "run", text, **words), None, STEP - 1)
    if lost == "source":
        source.rename(tmp_path / "away")
    else:
        original = prepared.Tokens.__init__

        def fail(self: Any, path: Path, *others: Any) -> None:
            original(self, path, *others)
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

        monkeypatch.setattr(prepared.Tokens, "__init__", fail)
    before = files(cache)
    with pytest.raises(StorageError) as error:
        run("simulated", 2, train, recipe_on(tmp_path / "run", text, checkpoint__resume=True, **words))
    assert failure(0, "start", error.value, 0.0).kind == "storage"
    with pytest.raises(RecipeError) as refused:
        run("simulated", 2, train, recipe_on(tmp_path / "other", text, **words))
    assert failure(0, "start", refused.value, 0.0).kind == "recipe"
    assert files(cache) == before
    monkeypatch.undo()
    if lost == "source":
        (tmp_path / "away").rename(source)
    run("simulated", 2, train, recipe_on(tmp_path / "run", text, checkpoint__resume=True, **words))
    assert_stood(tmp_path / "run", straight, 0)
