"""`optim.name` and `optim.groups` as a person types them, right and wrong."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.optim.groups import Treatment
from bagualu.trainer.recipe.compose import compose, load_recipe, save_recipe
from bagualu.trainer.recipe.config import Recipe
from tests.harness import run
from tests.parity import small_recipe
from tests.trainer.states import load_state, save_state

TYPED = 'optim.groups=[{pattern: "*.norm.weight", weight_decay: 0.1}, {pattern: layers.0.*, lr: 1e-4}]'


def test_groups_are_typed_saved_and_read(tmp_path: Path) -> None:
    recipe = compose(["recipe=tiny_dense", TYPED, f"run.dir={tmp_path}"])
    assert load_recipe(save_recipe(recipe)).optim == recipe.optim
    recipe.optim.lr, recipe.optim.weight_decay = 1e-3, 0.2
    assert recipe.optim.treatment("layers.0.attention.query.weight", 2) == Treatment(0.1, 0.2, "adamw")
    assert recipe.optim.treatment("layers.0.attention_norm.weight", 1) == Treatment(0.1, 0.0, "adamw")
    assert recipe.optim.treatment("layers.1.feed_forward.norm.weight", 1) == Treatment(1.0, 0.1, "adamw")
    assert recipe.optim.treatment("head.weight", 2) == Treatment(1.0, 0.2, "adamw")


@pytest.mark.parametrize("recipe", ["tiny_dense", "moe_tiny"])
def test_the_example_in_a_refusal_is_accepted_as_typed(recipe: str) -> None:
    with pytest.raises(RecipeError) as refused:
        compose([f"recipe={recipe}", "optim.groups=[{lr: 1}]"]).validate(1)
    (example,) = shlex.split(str(refused.value).partition("e.g. ")[2])
    typed = compose([f"recipe={recipe}", example])
    typed.validate(typed.world_size())
    norms = [name for name in parameter_shapes(typed.model) if typed.optim.treatment(name, 1).lr_factor != 1]
    assert norms[-1] == "norm.weight"
    assert "layers.0.attention_norm.weight" in norms


MUON = "optim.name=muon"
ONE = "optim.groups=[{pattern: head.weight"
WRONG = [
    (["optim.name=adam"], "optim.name=adam is unknown; give one of adamw, lion, muon, sgd"),
    (
        ["optim.name=sgd", "optim.betas=[0.5,0.5]"],
        "has no effect with optim.name=sgd; change optim.name or give optim.betas=",
    ),
    (["optim.momentum=0.5"], "has no effect with optim.name=adamw; change optim.name or leave it out"),
    (["optim.name=sgd", "optim.momentum=1"], "must lie in [0, 1), e.g. optim.momentum=0.9"),
    (["optim.groups=[x]"], "x has no pattern of parameter names; e.g. 'optim.groups="),
    (["optim.groups={pattern: '*'}"], "optim.groups takes a list, not {pattern: '*'}, e.g. 'optim.groups=[{pattern"),
    (["optim.groups=[{lr: 1}]"], "has no pattern of parameter names"),
    (["optim.groups=[{pattern: 1, lr: 1}]"], "has no pattern of parameter names"),
    ([ONE + ", rate: 1}]"], "unknown key rate; there are pattern, lr, weight_decay, optimizer and frozen"),
    ([ONE + "}]"], "head.weight changes nothing; give it an lr, a weight_decay, an optimizer or frozen: true"),
    ([ONE + ", lr: -1}]"], "lr=-1 of head.weight must be a number of at least 0"),
    ([ONE + ", lr: true}]"], "lr=True of head.weight must be a number of at least 0"),
    ([ONE + ", lr: inf}]"], "lr=inf of head.weight must be a number of at least 0"),
    (
        ["optim.groups=[{pattern: haed.weight, lr: 1}]"],
        "haed.weight matches no parameter; give another pattern",
    ),
    (
        ["optim.groups=[{pattern: '*', lr: 1}, {pattern: head.weight, lr: 1}]"],
        "matches only parameters of earlier groups",
    ),
    ([ONE + ", frozen: 1}]"], "frozen=1 of head.weight must be true or false"),
    ([ONE + ", frozen: true, lr: 1}]"], "lr of head.weight has no effect with frozen: true; leave one out"),
    (["optim.groups=[{pattern: '*', frozen: true}]"], "freezes all parameters; leave some of them to train"),
    (["optim.lr=0", ONE + ", lr: 0.01}]"], "follows the schedule of optim.lr, which is 0; give optim.lr=0.01, and freeze"),
    ([ONE + ", lr: 1e300, weight_decay: 0}]"], "lr=1e+300 of head.weight cannot be computed with in float32"),
    ([ONE + ", lr: 1" + "0" * 400 + "}]"], "of head.weight cannot be computed with in float32"),
    ([ONE + ", weight_decay: 1e-300}]"], "weight_decay=1e-300 of head.weight cannot be computed with in float32"),
    (["optim.groups=null"], "optim.groups takes a list, not null, e.g. 'optim.groups=[{pattern"),
    ([ONE + ", lr: 1}, {pattern: head.weight, lr: 1}]"], "matches only parameters of earlier groups"),
    ([ONE + ", lr: 10, weight_decay: 1}]"], "of head.weight is more than 2"),
    ([ONE + ", optimizer: adamw}]"], "optimizer=adamw of head.weight has no effect with optim.name=adamw; leave it out, or give"),
    ([MUON, ONE + ", optimizer: sgd}]"], "optimizer=sgd of head.weight must be adamw or muon"),
    ([MUON, ONE + ", optimizer: [muon]}]"], "optimizer=['muon'] of head.weight must be adamw or muon"),
    ([MUON, ONE + ", optimizer: muon, frozen: true}]"], "optimizer of head.weight has no effect with frozen: true"),
    (
        [MUON, "optim.groups=[{pattern: 'layers.0.*', optimizer: muon}]"],
        "layers.0.* with optimizer: muon matches layers.0.attention_norm.weight, which is no matrix; give a pattern of matrices",
    ),
    (
        [MUON, "optim.groups=[{pattern: '*.weight', optimizer: adamw}]"],
        "leaves optim.name=muon no matrix to train; give optim.name=",
    ),
    (
        [MUON, "optim.groups=[{pattern: '*norm.weight', lr: 1e-3}, {pattern: '*', frozen: true}]"],
        "leaves optim.name=muon no matrix to train; give optim.name=adamw",
    ),
    ([MUON, "optim.adjust_lr=rms"], "optim.adjust_lr=rms is unknown; give one of match_rms_adamw, original"),
    (
        ["optim.adjust_lr=original"],
        "has no effect with optim.name=adamw; change optim.name or give optim.adjust_lr=match_rms_adamw",
    ),
    ([MUON, "optim.momentum=1"], "must lie in [0, 1), e.g. optim.momentum=0.9"),
]


@pytest.mark.parametrize(("words", "fix"), WRONG)
def test_wrong_input_is_one_line_with_the_fix(words: list[str], fix: str) -> None:
    with pytest.raises(RecipeError) as refused:
        compose(["recipe=tiny_dense", *words]).validate(1)
    assert fix in str(refused.value)
    assert "\n" not in str(refused.value)


def save_one(communicator: Communicator, recipe: Recipe) -> None:
    save_state(assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab)), 1)


def load_one(communicator: Communicator, recipe: Recipe) -> None:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    load_state(state, Path(recipe.run.dir) / "checkpoints" / "step-00000001")


SGD = {"optim__name": "sgd"}
BY_MUON = {"optim__name": "muon"}
OTHERWISE = {**BY_MUON, "optim__groups": [{"pattern": "*.query.weight", "optimizer": "adamw"}]}
OTHERS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {},
        {"optim__name": "lion"},
        "holds exp_avg and exp_avg_sq, but optim.name=lion keeps exp_avg; give optim.name=adamw to go",
    ),
    (SGD, {}, "holds momentum_buffer, but optim.name=adamw keeps exp_avg and exp_avg_sq; give optim.name=sgd to"),
    (
        SGD,
        {**SGD, "optim__momentum": 0.0},
        "momentum_buffer, but optim.name=sgd keeps no moments; give optim.momentum=null to",
    ),
    (
        {**SGD, "optim__momentum": 0.0},
        {},
        "holds no moments, but optim.name=adamw keeps exp_avg and exp_avg_sq; give optim.name=sgd optim.momentum=0.0 to go on",
    ),
    ({"optim__name": "lion"}, {**SGD, "optim__momentum": 0.5}, "; give optim.name=lion optim.momentum=null to go on"),
    ({**SGD, "optim__groups": [{"pattern": "layers.*", "frozen": True}]}, {}, "; give optim.name=sgd to go on"),
    (
        BY_MUON,
        {},
        " and momentum_buffer, but optim.name=adamw keeps exp_avg and exp_avg_sq; give optim.name=muon to go on",
    ),
    (
        BY_MUON,
        OTHERWISE,
        "holds momentum_buffer of layers.0.attention.query.weight, which the recipe leaves to adamw; give it the other",
    ),
    (
        OTHERWISE,
        BY_MUON,
        "holds exp_avg and exp_avg_sq of layers.0.attention.query.weight, which the recipe leaves to muon; give it",
    ),
]


@pytest.mark.parametrize(("before", "after", "why"), OTHERS)
def test_a_run_does_not_go_on_with_another_optimizer(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], why: str
) -> None:
    def recipe(changes: dict[str, Any]) -> Recipe:
        return small_recipe(run__dir=str(tmp_path), model__layers=2, **changes)

    run("simulated", 1, save_one, recipe(before))
    run("simulated", 1, load_one, recipe(before))
    with pytest.raises(RecipeError) as refused:
        run("simulated", 1, load_one, recipe(after))
    assert why in str(refused.value)
