"""A run goes on with the tokens that it began with, wherever their text lies now, and with no others."""

import os
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.trainer import run as whole_run
from bagualu.trainer.recipe.compose import save_recipe
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.preflight import check_run_directory
from bagualu.trainer.recovery import state
from tests.harness import run
from tests.trainer.data.conftest import words
from tests.trainer.test_run import recipe_in


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `text` below the current one, with a file that is many times as large as the other."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").write_text(words(4_000, seed=1))
    (tmp_path / "text" / "b").write_text(words(40, seed=2))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "text"


def recipe_on(source: str, **changes: object) -> Recipe:
    fixed = {"data__source": source, "data__cache": "cache", "model__vocab": 300, "data__sequence_length": 16}
    return recipe_in(Path("run"), **{**fixed, "parallel__data": 1, "train__steps": 2, "checkpoint__resume": True, **changes})


def train(communicator: Communicator, recipe: Recipe) -> dict[str, Any]:
    check_run_directory(recipe)
    save_recipe(recipe)
    return whole_run.train(recipe, communicator)


def goes_on(recipe: Recipe) -> dict[str, Any]:
    (summary,) = run("simulated", 1, train, recipe)
    return summary


@pytest.mark.parametrize("spelling", ["text/", "./text", "{here}/text", "{here}/text/../text//", "link", "{here}/elsewhere"])
def test_a_run_goes_on_however_its_text_is_named_and_where_it_was_moved(text: Path, spelling: str) -> None:
    first = goes_on(recipe_on("text"))
    (text.parent / "link").symlink_to("text")
    if spelling.endswith("elsewhere"):
        text.rename(text.parent / "elsewhere")
    summary = goes_on(recipe_on(spelling.format(here=text.parent), train__steps=3))
    assert (summary["step"], summary["train_tokens"]) == (3, first["train_tokens"])


@pytest.mark.parametrize("change", ["another byte", "another file", "a file less"])
def test_text_that_changed_is_refused_where_it_was_and_where_it_was_moved(text: Path, change: str) -> None:
    goes_on(recipe_on("text"))
    if change == "another byte":
        (text / "b").write_bytes(b"x" + (text / "b").read_bytes()[1:])
        os.utime(text / "b", ns=(1, 1))
    elif change == "another file":
        (text / "c").write_text("more")
    else:
        (text / "b").unlink()
    with pytest.raises(RecipeError, match=r"with data fingerprint=\w+ but .*; put the text of data\.source=text back as it was"):
        goes_on(recipe_on("text", train__steps=3))
    text.rename(text.parent / "moved")
    with pytest.raises(RecipeError, match=r"with data\.source=text but the recipe has moved, whose tokens are not the same"):
        goes_on(recipe_on("moved", train__steps=3))


def test_a_run_that_kept_text_for_validation_does_not_train_on_it_later(text: Path) -> None:
    goes_on(recipe_on("text"))
    with pytest.raises(RecipeError, match=r"data\.split=share but the recipe has none.*; give train\.validation_sequences=64"):
        goes_on(recipe_on("text", train__validation_sequences=0, train__steps=3))
    recipe = recipe_on("text", train__validation_sequences=0, run__dir="other")
    assert goes_on(recipe)["validation_tokens"] == 0
    with pytest.raises(RecipeError, match=r"data\.split=none but the recipe has share.*; give train\.validation_sequences=0"):
        goes_on(recipe_on("text", run__dir="other", train__steps=3))


def test_a_run_of_an_earlier_version_is_told_how_to_keep_its_split(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints say nothing of the split, which was by whole files, also where validation was off."""
    identity, unknown = state.identity, ("data.split", "data.validation_fraction")
    for off in (0, 3):
        recipe = recipe_on("text", data__split="files", run__dir=f"run-{off}", train__validation_sequences=off)
        with monkeypatch.context() as earlier:
            earlier.setattr(state, "identity", lambda parts: {k: v for k, v in identity(parts).items() if k not in unknown})
            before = goes_on(recipe)
        now: dict[str, object] = {"run__dir": recipe.run.dir, "train__validation_sequences": off, "train__steps": 3}
        with pytest.raises(RecipeError, match=r"an earlier version kept whole files .*; give data\.split=files to go on"):
            goes_on(recipe_on("text", **now))
        summary = goes_on(recipe_on("text", data__split="files", **now))
        assert (summary["step"], summary["train_tokens"]) == (3, before["train_tokens"])


def test_the_advice_for_another_split_holds_where_nothing_is_validated(text: Path) -> None:
    off: dict[str, object] = {"train__validation_sequences": 0, "train__steps": 3}
    goes_on(recipe_on("text", data__split="files", **{**off, "train__steps": 2}))
    with pytest.raises(RecipeError, match=r"data\.split=files but the recipe has none.*; give data\.split=files to go on"):
        goes_on(recipe_on("text", **off))
    assert goes_on(recipe_on("text", data__split="files", **off))["step"] == 3
    goes_on(recipe_on("text", run__dir="other", **{**off, "train__steps": 2}))
    fix = r"give train\.validation_sequences=0 data\.split=share to go on"
    with pytest.raises(RecipeError, match=rf"data\.split=none but the recipe has files.*; {fix}"):
        goes_on(recipe_on("text", run__dir="other", data__split="files", **off))
    assert goes_on(recipe_on("text", run__dir="other", **off))["step"] == 3


def test_a_run_of_an_earlier_version_is_told_that_linked_folders_were_left_out(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity, unknown = state.identity, ("data.split", "data split in fact", "data.validation_fraction")
    with monkeypatch.context() as earlier:
        earlier.setattr(state, "identity", lambda parts: {k: v for k, v in identity(parts).items() if k not in unknown})
        goes_on(recipe_on("text", data__split="files"))
    (text.parent / "more").mkdir()
    (text.parent / "more" / "c").write_text(words(100, seed=3))
    (text / "link").symlink_to("../more")
    with pytest.raises(RecipeError, match=r"as it was, without links to folders, which an earlier version left out"):
        goes_on(recipe_on("text", data__split="files", train__steps=3))
    (text / "link").unlink()
    assert goes_on(recipe_on("text", data__split="files", train__steps=3))["step"] == 3


def test_random_tokens_do_not_take_over_from_text(text: Path) -> None:
    goes_on(recipe_on("text"))
    with pytest.raises(RecipeError, match=r"has data\.source=text, not random; give data\.source=text"):
        goes_on(recipe_on("random", train__steps=3))
