"""Validation says the same on every layout: loss and bits per byte over the same held-out sequences."""

import functools
from dataclasses import dataclass

import pytest

from bagualu.comm.group import Communicator
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.evaluate import Validation, validate
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import small_recipe


@dataclass
class Seen:
    validation: Validation | None
    after_another_step: float


def evaluate(communicator: Communicator, recipe: Recipe) -> Seen:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    train_step(state, 0)
    return Seen(validate(state), train_step(state, 1).loss)


def held_out(**changes: object) -> Recipe:
    mixture = {"model__moe__experts": 4, "model__moe__ffn": 8}
    return small_recipe(train__validation_sequences=11, **mixture, **changes)


@functools.cache
def serial(text: str) -> list[Seen]:
    return run("simulated", 1, evaluate, with_text(held_out(), text))


def with_text(recipe: Recipe, text: str) -> Recipe:
    recipe.data.source, recipe.model.vocab = text, 320
    return recipe


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        words = " ".join(f"word{(number * 31 + i * i) % 97}" for i in range(60))
        (folder / f"{number}.txt").write_text(f"{words}\n", encoding="utf-8")
    return str(folder)


LAYOUTS = [
    {"data": 4}, {"data": 2, "expert": 2, "tensor": 2}, {"pipeline": 2, "data": 2}, {"tensor": 2, "sequence": True, "pipeline": 2},
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_validates_the_same(text: str, layout: dict[str, object]) -> None:
    recipe = with_text(held_out(**{f"parallel__{axis}": degree for axis, degree in layout.items()}), text)
    expected = serial(text)[0]
    assert expected.validation is not None
    assert expected.validation.bits_per_byte is not None
    for seen in run("simulated", 4, evaluate, recipe):
        assert seen.validation is not None
        assert seen.validation.loss == pytest.approx(expected.validation.loss, rel=1e-9)
        assert seen.validation.bits_per_byte == pytest.approx(expected.validation.bits_per_byte, rel=1e-9)
        assert seen.after_another_step == pytest.approx(expected.after_another_step, rel=1e-9)
