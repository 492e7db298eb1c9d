"""train.micro_batch=auto takes the size with the least step that fits, and keeps it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.launch.cli import main
from bagualu.launch.verbs.command_line import CommandLine
from bagualu.launch.verbs.plan import read_plan
from bagualu.launch.verbs.question import read_question
from bagualu.trainer.costs.fits import Device, memories
from bagualu.trainer.costs.micro_batch import choose_micro_batch, size_as_begun
from bagualu.trainer.costs.prediction import fullest
from bagualu.trainer.recipe.compose import compose, load_recipe, save_recipe
from bagualu.trainer.recipe.config import Recipe
from tests.parity import small_recipe

LARGE = Device(2**34, "this machine")


def auto(**changes: object) -> Recipe:
    return small_recipe(train__micro_batch="auto", data__global_batch=8, **changes)


def chosen(recipe: Recipe, world: int = 1, device: Device | None = LARGE) -> int:
    size = choose_micro_batch(recipe, world, device, size_as_begun(recipe)).train.micro_batch
    assert isinstance(size, int)
    return size


def needed(size: int) -> int:
    recipe = replace(auto(), train=replace(auto().train, micro_batch=size))
    return sum(fullest(memories(recipe, recipe.validate(1))).values())


def test_a_number_stays_as_it_is() -> None:
    recipe = small_recipe(train__micro_batch=2)
    assert choose_micro_batch(recipe, 1, Device(1, "nothing")) is recipe


def test_all_sequences_of_a_data_rank_pass_together_if_they_fit() -> None:
    assert chosen(auto()) == 8
    assert chosen(auto(parallel__data=4), 4) == 2
    assert chosen(auto(parallel__data=2, parallel__tensor=2), 4) == 4
    assert chosen(auto(parallel__data=2, parallel__shares=[3, 1]), 2) == 2  # 4 micro-batches in all


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_largest_that_fits_is_taken(size: int) -> None:
    enough = Device(int(needed(size) / 0.8) + 1, "this machine")
    assert chosen(auto(), device=enough) == size
    assert needed(2 * size) > enough.memory_bytes * 0.8


def test_where_nothing_fits_or_nothing_is_known_it_is_1_and_the_check_of_memory_says_the_rest() -> None:
    assert chosen(auto(), device=Device(1000, "this machine")) == 1
    assert chosen(auto(), device=None) == 1


@pytest.mark.parametrize(("length", "size"), [(8, 8), (64, 4), (128, 2), (512, 1)])
def test_a_pipeline_gets_more_micro_batches_the_longer_its_passes_are(length: int, size: int) -> None:
    """With 2 ranks of equal stages and n micro-batches of 8 / n sequences, a step takes (1 + 1 / n) (1 + 100 n / (8 length))."""
    recipe = auto(parallel__pipeline=2, model__layers=32, model__vocab=8, data__sequence_length=length)
    assert min((1, 2, 4, 8), key=lambda n: (1 + 1 / n) * (1 + 100 * n / (8 * length))) == 8 // size
    assert chosen(recipe, 2) == size


def begun(tmp_path: Path, size: int) -> None:
    save_recipe(small_recipe(train__micro_batch=size, data__global_batch=8, run__dir=str(tmp_path)))
    (tmp_path / "metrics.jsonl").write_text("{}\n")


def test_a_run_that_resumes_keeps_its_size_unless_that_does_not_divide_any_more(tmp_path: Path) -> None:
    begun(tmp_path, 4)
    again = auto(run__dir=str(tmp_path), checkpoint__resume=True)
    assert chosen(again) == 4
    wider = auto(run__dir=str(tmp_path), checkpoint__resume=True, parallel__data=4)
    assert chosen(wider, 4) == 2
    assert chosen(again, device=Device(int(needed(1) / 0.8) + 1, "this machine")) == 1, "4 does not fit any more"
    assert chosen(auto(run__dir=str(tmp_path))) == 8  # a new run


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "true", "null", "[1]", "largest"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(RecipeError, match=re.escape("must be at least 1, a whole number, or auto")):
        compose(["recipe=tiny", f"train.micro_batch={value}"]).validate(1)


def test_shares_that_are_measured_need_a_number() -> None:
    with pytest.raises(RecipeError, match=r"parallel\.shares=measured needs many; give a number"):
        chosen(auto(parallel__data=2, parallel__shares="measured"), 2)


def test_other_verbs_refuse_what_they_cannot_take() -> None:
    with pytest.raises(RecipeError, match=r"train.micro_batch=some must be at least 1"):
        read_plan(CommandLine("plan", ["recipe=llama3_8b", "cluster=h100", "world=8", "train.micro_batch=some"]))
    quoted = ["recipe=llama3_8b", "cluster=h100", "world=8", "train.micro_batch='auto'"]
    assert "train.micro_batch" not in read_plan(CommandLine("plan", quoted)).given


def test_a_prediction_takes_what_fits_a_device_and_a_plan_searches() -> None:
    words = ["recipe=llama3_8b", "cluster=h100", "world=8", "parallel.zero=3", "train.micro_batch=auto"]
    size = read_question(CommandLine("simulate", words)).recipe.train.micro_batch
    assert isinstance(size, int)
    assert size >= 1
    question = read_plan(CommandLine("plan", words))
    assert "train.micro_batch" not in question.given
    assert not any("micro_batch" in word for word in question.words)


def test_the_first_line_and_config_yaml_say_which_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["recipe=tiny_dense", "comm.backend=simulated", "parallel.data=2", "data.source=random", "data.global_batch=8",
             "train.micro_batch=auto", "train.steps=1", "model.layers=1", "checkpoint.every=0", "train.validation_sequences=0",
             f"run.dir={tmp_path}/run"]  # fmt: skip
    assert main(["train", *words], entrypoint="tests.trainer.recipe.test_choose_backend:nothing") == 0
    assert " and train.micro_batch=4 (auto), in " in capsys.readouterr().err.splitlines()[0]
    assert load_recipe(tmp_path / "run" / "config.yaml").train.micro_batch == 4
