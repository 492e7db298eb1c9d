"""train.compile=auto generates kernels for runs that are long enough for it, and a resumed run does as it began."""

from bisect import bisect_left
from math import ceil
from pathlib import Path

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Chip
from bagualu.trainer.costs.compilation import COMPILE_SECONDS, Saved, choose_compile, compile_as_begun
from bagualu.trainer.recipe.compose import save_recipe
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.settle import settle
from tests.parity import small_recipe

LONG = 10**9


@pytest.fixture(autouse=True)
def _compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.touch(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def auto(steps: int = LONG, **changes: object) -> Recipe:
    return small_recipe(**{"train__compile": "auto", "train__steps": steps, "comm__backend": "gloo", **changes})


def saving(seconds: float) -> Saved:
    """A prediction of the seconds that kernels save in each micro-batch."""
    return lambda recipe, chip, micro_batches: seconds * micro_batches


MUCH = saving(1.0)


def chosen(recipe: Recipe, world: int = 1, before: bool | None = None, saved: Saved = MUCH) -> object:
    return choose_compile(recipe, world, world, saved, before)[0].train.compile


def test_a_run_must_be_long_enough() -> None:
    assert chosen(auto(2)) is False
    assert choose_compile(auto(), 1, 1, MUCH) == (auto(train__compile=True), "train.compile=true (auto)")


def shortest(saved: Saved, world: int = 1, **changes: object) -> int:
    """The fewest steps of a run for which kernels are generated."""
    return bisect_left(range(LONG), True, key=lambda steps: chosen(auto(steps + 1, **changes), world, saved=saved)) + 1


def test_it_pays_for_a_run_that_saves_twice_what_it_takes() -> None:
    micro_batches = auto().micro_batches()
    for seconds in (1e-7, 2e-7):
        assert shortest(saving(seconds)) == ceil(2 * COMPILE_SECONDS / (seconds * micro_batches))
    assert abs(shortest(saving(1e-7), 2, parallel__data=2) - 2 * shortest(saving(1e-7))) <= 1  # half the micro-batches each
    assert abs(shortest(saving(1e-7), 2, parallel__tensor=2) - 2 * shortest(saving(1e-7))) <= 1


def test_nothing_is_predicted_for_a_short_run() -> None:
    """Even if kernels saved the most that they can save, a run of few steps would not win back the time to compile them."""

    def saved(recipe: Recipe, chip: Chip, micro_batches: int) -> float:
        raise AssertionError("predicting takes seconds")

    assert choose_compile(auto(2), 1, 1, saved) == (auto(2, train__compile=False), "")
    with pytest.raises(AssertionError):
        choose_compile(auto(), 1, 1, saved)
    assert abs(shortest(MUCH, launch__threads=2) - 2 * shortest(MUCH, launch__threads=1)) <= 1


def test_a_wrong_recipe_is_refused_before_anything_is_predicted() -> None:
    for changes in ({"data__global_batch": -8}, {"train__micro_batch": "foo"}, {"train__steps": -LONG}):
        with pytest.raises(RecipeError):
            choose_compile(auto(**changes), 1, 1, MUCH)


def test_the_chip_of_the_prediction_has_the_cores_of_a_rank() -> None:
    seen: list[Chip] = []

    def saved(recipe: Recipe, chip: Chip, micro_batches: int) -> float:
        seen.append(chip)
        return 0.1

    for threads in (1, 3):
        choose_compile(auto(launch__threads=threads, train__dtype="float32"), 1, 1, saved)
    one, three = seen
    assert three.memory_bytes_per_second == 3 * one.memory_bytes_per_second
    assert three.peak("float32") == 3 * one.peak("float32")


def test_a_recipe_is_settled_by_what_its_own_step_would_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_fusion.py tests the prediction itself."""
    assert settle(auto(), 1, 1)[0].train.compile is True
    assert settle(auto(), 1, 1, predicts=False)[0].train.compile is False
    monkeypatch.setattr("bagualu.trainer.simulation.gain.seconds_saved", saving(0.0))
    assert settle(auto(), 1, 1)[0].train.compile is False


@pytest.mark.parametrize(("backend", "compiles"), [("gloo", True), ("simulated", False), ("nccl", False)])
def test_threads_of_one_process_and_gpus_do_not(backend: str, compiles: bool) -> None:
    assert chosen(auto(comm__backend=backend)) is compiles


def test_what_the_recipe_says_stays() -> None:
    for given in (True, False, "maybe"):
        recipe = auto(1 if given is True else LONG, train__compile=given)
        assert choose_compile(recipe, 1, 1, MUCH) == (recipe, "")


def test_a_resumed_run_does_as_it_began(tmp_path: Path) -> None:
    for compiles in (True, False):
        folder = tmp_path / str(compiles)
        recipe = auto(LONG, run__dir=str(folder), checkpoint__resume=True)
        assert compile_as_begun(recipe) is None
        (folder / "checkpoints").mkdir(parents=True)
        save_recipe(auto(train__compile=compiles, run__dir=str(folder)))
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
        assert compile_as_begun(recipe) is compiles
        assert chosen(recipe, before=compiles) is compiles
        assert chosen(auto(1), before=compiles) is compiles


def test_without_a_compiler_nothing_is_generated_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert choose_compile(auto(), 1, 1, MUCH) == (auto(train__compile=False), "")
    settled, said = choose_compile(auto(train__compile=True), 1, 1, MUCH)
    assert settled.train.compile is False
    assert "there is no C++ compiler (install g++" in said
    assert "there is no C++ compiler" in choose_compile(auto(), 1, 1, MUCH, before=True)[1]
