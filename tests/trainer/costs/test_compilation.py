"""train.compile=auto generates kernels for runs that are long enough for it, and a resumed run does as it began."""

from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import pytest

from bagualu.comm.topology import Chip
from bagualu.trainer.costs.compilation import MOST_GAIN, choose_compile, compile_as_begun
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


def gain_of(fraction: float) -> Callable[[Recipe, Chip], float]:
    return lambda recipe, chip: fraction


TENTH = gain_of(0.1)


def chosen(recipe: Recipe, world: int = 1, before: bool | None = None, gain: float = 0.1) -> object:
    return choose_compile(recipe, world, world, gain_of(gain), before)[0].train.compile


def test_a_run_must_be_long_enough() -> None:
    assert chosen(auto(2)) is False
    assert choose_compile(auto(), 1, 1, TENTH) == (auto(train__compile=True), "train.compile=true (auto)")


def shortest(threads: int, gain: float = 0.1) -> int:
    """The fewest steps of a run for which kernels are generated."""
    return bisect_left(range(LONG), True, key=lambda steps: chosen(auto(steps + 1, launch__threads=threads), gain=gain)) + 1


def test_it_pays_on_quicker_machines_for_longer_runs() -> None:
    assert abs(shortest(2) - 2 * shortest(1)) <= 1


def test_it_pays_for_shorter_runs_where_more_is_saved_but_not_for_any() -> None:
    assert abs(shortest(1, gain=0.05) - 2 * shortest(1)) <= 1
    assert shortest(1, gain=2 * MOST_GAIN) == shortest(1, gain=MOST_GAIN)


def test_nothing_is_predicted_for_a_short_run() -> None:
    def gain(recipe: Recipe, chip: Chip) -> float:
        raise AssertionError("predicting takes seconds")

    assert choose_compile(auto(2), 1, 1, gain) == (auto(2, train__compile=False), "")
    with pytest.raises(AssertionError):
        choose_compile(auto(), 1, 1, gain)


def test_the_chip_of_the_prediction_has_the_cores_of_a_rank() -> None:
    seen: list[Chip] = []

    def gain(recipe: Recipe, chip: Chip) -> float:
        seen.append(chip)
        return 0.1

    for threads in (1, 3):
        choose_compile(auto(launch__threads=threads, train__dtype="float32"), 1, 4, gain)
    one, three = seen
    assert three.memory_bytes_per_second == 3 * one.memory_bytes_per_second
    assert three.peak("float32") == 3 * one.peak("float32")


def test_a_recipe_is_settled_by_what_its_own_step_would_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the simulator's costs, which tests of trainer/simulation/gain.py look into."""
    assert settle(auto(), 1, 1)[0].train.compile is True
    monkeypatch.setattr("bagualu.trainer.simulation.gain.gain_alone", gain_of(0.0))
    assert settle(auto(), 1, 1)[0].train.compile is False


@pytest.mark.parametrize(("backend", "compiles"), [("gloo", True), ("simulated", False), ("nccl", False)])
def test_threads_of_one_process_and_gpus_do_not(backend: str, compiles: bool) -> None:
    assert chosen(auto(comm__backend=backend)) is compiles


def test_what_the_recipe_says_stays() -> None:
    for given in (True, False, "maybe"):
        recipe = auto(1 if given is True else LONG, train__compile=given)
        assert choose_compile(recipe, 1, 1, TENTH) == (recipe, "")


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
    assert choose_compile(auto(), 1, 1, TENTH) == (auto(train__compile=False), "")
    settled, said = choose_compile(auto(train__compile=True), 1, 1, TENTH)
    assert settled.train.compile is False
    assert "there is no C++ compiler (install g++" in said
    assert "there is no C++ compiler" in choose_compile(auto(), 1, 1, TENTH, before=True)[1]
