"""Operators are measured where it can matter, once for each machine and shape, and all ranks have the same."""

import json
import logging
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator, connect
from bagualu.comm.simulated import run
from bagualu.comm.world import World
from bagualu.trainer.costs import choose_operators as module
from bagualu.trainer.costs import operator_times
from bagualu.trainer.costs.choose_operators import choose_operators
from bagualu.trainer.costs.operator_cases import OperatorCalls, cases_of
from bagualu.trainer.costs.operator_times import measurable, measure, times_of
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.operators.attention import attention_blocks
from bagualu.trainer.operators.choice import GIVEN, MEASURED, USUAL, Chosen, ChosenOperators, quickest
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.operator_set import operator_set
from bagualu.trainer.operators.panels import products_in_panels
from bagualu.trainer.operators.registry import AUTO, DEFAULT_VARIANTS, load_variant
from bagualu.trainer.operators.tiles import attention_tiles
from bagualu.trainer.operators.usual import usual_variant
from bagualu.trainer.recipe.config import Recipe
from tests.parity import small_recipe

CPU = torch.device("cpu")


def recipe_in(folder: Path, **changes: object) -> Recipe:
    """Returns a recipe whose attention takes long enough to be measured."""
    large: dict[str, object] = {
        "run__dir": str(folder / "run"), "data__cache": str(folder / "cache"), "comm__backend": "gloo", "data__global_batch": 32,
        "data__sequence_length": 512, "model__hidden": 128, "train__dtype": "float32",
    }  # fmt: skip
    return small_recipe(**{**large, **changes})


def chosen(recipe: Recipe) -> tuple[dict[str, Chosen], list[str]]:
    found, said = choose_operators(recipe, connect("gloo", World(0, 1)))
    return found.operators, said


def pretend(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[OperatorCalls]:
    """Measures nothing, and returns the list of what would have been, as on a machine where only attention has several variants."""
    asked: list[OperatorCalls] = []
    monkeypatch.setattr(module, "measurable", lambda operator, chip: measurable(operator, chip) if operator == "attention" else {})
    monkeypatch.setattr(module, "times_of", lambda case, device, cache: asked.append(case) or seconds)
    return asked


def record(recipe: Recipe, attention: str, chip: str = "another chip") -> ChosenOperators:
    before = {operator: Chosen(default, USUAL) for operator, default in DEFAULT_VARIANTS.items()}
    recorded = ChosenOperators(chip, {**before, "attention": Chosen(attention, MEASURED, {"blocks": 1.0, "kernel": 2.0})})
    Path(recipe.run.dir).mkdir(parents=True)
    (Path(recipe.run.dir) / "operators.json").write_text(json.dumps(recorded.to_json()))
    recipe.checkpoint = replace(recipe.checkpoint, resume=True)
    return recorded


def test_the_quicker_variant_of_attention_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, blocks=0.001, kernel=0.002)
    found, said = chosen(recipe_in(tmp_path))
    assert found["attention"] == Chosen("blocks", MEASURED, {"blocks": 0.004, "kernel": 0.008})  # of 4 layers
    assert said == ["operators.attention=blocks, as measured: blocks 4 ms, kernel 8 ms for a micro-batch"]
    assert [case.operator for case in asked] == ["attention"]  # the others have one variant each
    assert all(found[name] == Chosen(DEFAULT_VARIANTS[name], USUAL) for name in found.keys() - {"attention"})


def test_the_usual_variant_needs_no_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, blocks=0.002, kernel=0.002)
    found, said = chosen(recipe_in(tmp_path))
    assert found["attention"] == Chosen("kernel", USUAL, {"blocks": 0.008, "kernel": 0.008})
    assert not said


@pytest.mark.parametrize(
    "changes",
    [
        {"data__sequence_length": 64},
        {"comm__backend": "simulated"},
        {"operators__attention": "kernel"},
        {"data__global_batch": 1},
    ],
    ids=str,
)
def test_what_gains_little_or_is_given_is_not_measured(
    tmp_path: Path, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pretend(monkeypatch, blocks=0.001, kernel=0.002)
    found, said = chosen(recipe_in(tmp_path, **changes))
    assert found["attention"] == Chosen("kernel", GIVEN if "operators__attention" in changes else USUAL)
    assert not asked
    assert not said


def test_how_long_the_run_is_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on beyond its first end keeps its bits, and a shorter one has those of its first steps."""
    pretend(monkeypatch, blocks=0.001, kernel=0.002)
    assert chosen(recipe_in(tmp_path, train__steps=1)) == chosen(recipe_in(tmp_path, train__steps=10**6))


def test_layers_with_windows_of_their_own_count_by_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_in(tmp_path, model__window=100, model__full_attention_every=2)
    asked = []

    def times(case: OperatorCalls, device: object, cache: object) -> dict[str, float]:
        asked.append(case)
        return {"blocks": 1.0, "kernel": 3.0} if case.shape.window else {"blocks": 4.0, "kernel": 1.0}

    pretend(monkeypatch)
    monkeypatch.setattr(module, "times_of", times)
    found, _ = chosen(recipe)
    assert {case.shape.window: case.calls for case in asked} == {100: 2, None: 2}
    assert found["attention"] == Chosen(AUTO, USUAL, {"blocks": 10.0, "kernel": 8.0})


def test_a_resumed_run_keeps_its_choice_whatever_is_quicker_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, blocks=0.003, kernel=0.001)
    recipe = recipe_in(tmp_path)
    recorded = record(recipe, "blocks")
    found, said = choose_operators(recipe, connect("gloo", World(0, 1)))
    assert found == recorded
    assert not asked
    assert ["chose its operators on another chip" in line for line in said] == [True]
    recipe.operators = replace(recipe.operators, attention="kernel")
    assert chosen(recipe)[0]["attention"] == Chosen("kernel", GIVEN)


def test_a_run_of_an_earlier_version_goes_on_with_the_usual_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, blocks=0.001, kernel=0.003)
    recipe = recipe_in(tmp_path, checkpoint__resume=True)
    Path(recipe.run.dir).mkdir()
    (Path(recipe.run.dir) / "metrics.jsonl").write_text('{"step": 1}\n')
    assert chosen(recipe)[0]["attention"] == Chosen("kernel", USUAL)
    assert not asked


def test_a_damaged_record_is_said_and_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = pretend(monkeypatch, blocks=0.001, kernel=0.003)
    recipe = recipe_in(tmp_path)
    record(recipe, "blocks")
    (Path(recipe.run.dir) / "operators.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert chosen(recipe)[0]["attention"] == Chosen("kernel", USUAL)
    assert "operators.json cannot be read" in caplog.text
    assert not asked


def test_all_ranks_have_the_choice_of_the_first(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, comm__backend="simulated")
    recorded = record(recipe, "blocks")
    first, second = run(2, lambda communicator: choose_operators(recipe, communicator))
    assert first[0] == second[0] == recorded
    assert not second[1]


@pytest.mark.parametrize("variant", ["blocks", "kernel"])
def test_what_the_machine_of_any_rank_lacks_is_not_taken(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    this_rank = threading.local()

    def choose(communicator: Communicator) -> tuple[ChosenOperators, list[str]]:
        this_rank.lacks = "a better chip" if communicator.rank == 1 else None
        return choose_operators(recipe, communicator)

    monkeypatch.setattr(type(attention_blocks), "lacks", lambda self: this_rank.lacks, raising=False)
    recipe = recipe_in(tmp_path, comm__backend="simulated")
    recorded = record(recipe, variant)
    (first, said), (second, _) = run(2, choose)
    assert first == second
    remark = "operators.attention=auto: blocks needs a better chip, which not all ranks have"
    if variant == "blocks":
        assert first.operators == {**recorded.operators, "attention": Chosen(AUTO, USUAL)}
        assert said[-1] == remark
    else:
        assert first == recorded
        assert remark not in said


def test_a_named_variant_that_a_machine_lacks_is_refused_but_may_be_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(attention_blocks), "lacks", lambda self: "a better chip", raising=False)
    with pytest.raises(RecipeError, match=r"operators.attention=blocks needs a better chip, which this machine has not"):
        chosen(recipe_in(tmp_path, operators__attention="blocks"))
    assert operator_set(OperatorsConfig(attention="blocks"), "cpu", here=False).attention is not None


def test_what_this_machine_lacks_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(attention_blocks), "lacks", lambda self: "a better chip", raising=False)
    recipe = recipe_in(tmp_path, data__sequence_length=16)
    case = next(cases_of(work_of(recipe, recipe.validate(1))))
    assert "blocks" not in times_of(case, CPU, tmp_path)


def test_a_variant_that_cannot_be_had_is_refused_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(recipe: Recipe, communicator: Communicator) -> None:
        assert communicator.rank == 0
        raise RecipeError("no such variant")

    monkeypatch.setattr(module, "_choose", refuse)

    def refused(communicator: Communicator) -> str:
        with pytest.raises(RecipeError) as error:
            choose_operators(recipe_in(tmp_path), communicator)
        return str(error.value)

    assert run(2, refused) == ["no such variant"] * 2


def test_times_are_measured_once(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, data__sequence_length=32)
    cases = list(cases_of(work_of(recipe, recipe.validate(1))))
    assert {case.operator for case in cases} == set(DEFAULT_VARIANTS)
    for case in cases:
        times = times_of(case, CPU, tmp_path)
        assert all(seconds > 0 for seconds in times.values())
        tiles = set() if attention_tiles.lacks() else {"tiles"}
        panels = set() if products_in_panels.lacks() else {"panels"}
        names = {"attention": {"blocks", "kernel"} | tiles, "linear": {"torch"} | tiles | panels}
        assert times.keys() == names.get(case.operator, {DEFAULT_VARIANTS[case.operator]})
        assert times_of(case, CPU, tmp_path) == times  # times never repeat to the last digit
    assert len(list((tmp_path / "operators").iterdir())) == len(cases)


def test_other_shapes_and_dtypes_are_measured_anew(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, data__sequence_length=16)
    first = next(cases_of(work_of(recipe, recipe.validate(1))))
    others = [replace(first, dtype="float64"), replace(first, shape=replace(first.shape, window=3))]
    for case in (first, *others, first):
        times_of(case, CPU, tmp_path)
    assert len(list((tmp_path / "operators").iterdir())) == 3


@pytest.mark.parametrize("style", [{"model__positions": "alibi"}, {"model__norm": "layer"}, {"model__window": 7}, {}], ids=str)
def test_all_kinds_of_models_can_be_measured(tmp_path: Path, style: dict[str, object]) -> None:
    recipe = recipe_in(tmp_path, data__sequence_length=16, train__dtype="bfloat16", **style)
    for case in cases_of(work_of(recipe, recipe.validate(1))):
        assert times_of(case, CPU, tmp_path)


def test_a_variant_that_fails_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipe_in(tmp_path, data__sequence_length=16)
    case = next(cases_of(work_of(recipe, recipe.validate(1))))

    def works(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return query + key + value

    def fails(*given: object) -> torch.Tensor:
        raise NotImplementedError("no such width")

    with caplog.at_level(logging.WARNING):
        assert measure(case.prepare(CPU), {"kernel": works, "vendor": fails}, "kernel", CPU).keys() == {"kernel"}
    assert "the variant vendor fails (NotImplementedError: no such width)" in caplog.text
    with pytest.raises(NotImplementedError):
        measure(case.prepare(CPU), {"kernel": fails}, "kernel", CPU)


def test_the_usual_variant_is_that_of_the_chip() -> None:
    assert [usual_variant("cpu", True, length, None) for length in (512, 513)] == ["blocks", "kernel"]
    assert [usual_variant("cpu", False, 513, window) for window in (512, 513)] == ["blocks", "kernel"]
    assert usual_variant("cuda", True, 10, 5) == "kernel"


GENERATED = {"norm", "rotary", "gate", "loss"}


@pytest.mark.parametrize("compiles", [False, True])
def test_kernels_are_generated_only_with_train_compile_and_never_measured(
    tmp_path: Path, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To measure them would take as long as generating them."""
    asked = pretend(monkeypatch, blocks=0.001, kernel=0.002)
    monkeypatch.setattr(module, "LEAST_SECONDS", 0.0)
    found, _ = chosen(recipe_in(tmp_path, train__compile=compiles, operators__gate="eager"))
    assert {name for name, one in found.items() if one.variant == "generated"} == (GENERATED - {"gate"} if compiles else set())
    assert {case.operator for case in asked} == {"attention"}
    assert found["attention"].variant == "blocks"


@pytest.mark.parametrize("compiles", [False, True])
def test_an_operator_that_a_record_lacks_is_the_usual_one(tmp_path: Path, compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a record of an earlier version, without the update."""
    pretend(monkeypatch, blocks=0.001, kernel=0.002)
    recipe = recipe_in(tmp_path, train__compile=compiles)
    first, _ = choose_operators(recipe, connect("gloo", World(0, 1)))
    Path(recipe.run.dir).mkdir()
    values = first.to_json()
    del values["operators"]["update"]
    (Path(recipe.run.dir) / "operators.json").write_text(json.dumps(values))
    recipe.checkpoint = replace(recipe.checkpoint, resume=True)
    found, said = chosen(recipe)
    assert found == {**first.operators, "update": Chosen("fused", USUAL)}
    assert said == []


def test_a_run_that_goes_on_without_a_compiler_has_eager_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, blocks=0.001, kernel=0.002)
    recipe = recipe_in(tmp_path, train__compile=True)
    first, _ = choose_operators(recipe, connect("gloo", World(0, 1)))
    Path(recipe.run.dir).mkdir()
    (Path(recipe.run.dir) / "operators.json").write_text(json.dumps(first.to_json()))
    recipe.checkpoint = replace(recipe.checkpoint, resume=True)
    assert choose_operators(recipe, connect("gloo", World(0, 1))) == (first, [])
    recipe.train = replace(recipe.train, compile=False)
    found, said = chosen(recipe)
    assert all(found[name].variant == DEFAULT_VARIANTS[name] for name in GENERATED)
    assert found["attention"] == first.operators["attention"]
    assert said == ["train.compile=false: norm, rotary, gate, loss are not generated kernels any more, as they were so far"]


def test_generated_kernels_that_a_recipe_names_stay_when_it_resumes(tmp_path: Path) -> None:
    """Although train.compile=auto has been settled to false, which leaves out only what it had chosen itself."""
    recipe = recipe_in(tmp_path, train__compile=False, operators__norm="generated", data__sequence_length=16)
    first, _ = choose_operators(recipe, connect("gloo", World(0, 1)))
    assert first.operators["norm"] == Chosen("generated", GIVEN)
    Path(recipe.run.dir).mkdir()
    (Path(recipe.run.dir) / "operators.json").write_text(json.dumps(first.to_json()))
    recipe.checkpoint, recipe.operators = replace(recipe.checkpoint, resume=True), OperatorsConfig()
    assert choose_operators(recipe, connect("gloo", World(0, 1))) == (first, [])


def test_a_compiler_that_fails_leaves_all_ranks_without_generated_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("norm", "rotary", "gate", "loss"):
        monkeypatch.setattr(load_variant(name, "generated", "cpu"), "fails", lambda chip: "a compiler that works")
    found, said = chosen(recipe_in(tmp_path, train__compile=True, data__sequence_length=16))
    assert [found[name] for name in ("norm", "rotary", "gate", "loss")] == [Chosen(AUTO, USUAL)] * 4
    assert said[-1] == "operators.loss=auto: generated needs a compiler that works, which not all ranks have"


def test_so_does_one_that_fails_for_a_generated_variant_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks on which it fails would else compute another way than the others, and round another way."""
    monkeypatch.setattr(load_variant("update", "generated", "cpu"), "fails", lambda chip: "a compiler that works")
    found, said = chosen(recipe_in(tmp_path, operators__update="generated", data__sequence_length=16))
    assert found["update"] == Chosen(AUTO, USUAL)
    assert said[-1] == "operators.update=auto: generated needs a compiler that works, which not all ranks have"


def test_one_that_fails_while_it_is_measured_is_not_taken_although_it_is_the_usual_one() -> None:
    assert quickest(["blocks"], [{"kernel": 2.0, "tiles": 1.0}]).variant == "tiles"


def test_a_package_that_cannot_be_imported_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(operator: str, variant: str, chip: str) -> bool:
        if variant == "blocks":
            raise RecipeError("operators.attention=blocks cannot be imported")
        return True

    monkeypatch.setattr(operator_times, "is_usable", refuse)
    assert "blocks" not in measurable("attention", "cpu")
    assert "cannot be imported" in caplog.text
