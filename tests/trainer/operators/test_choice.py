"""The quickest variant is chosen where it is clearly so, and what a run has recorded is kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bagualu.trainer.operators.choice import (
    GIVEN,
    MEASURED,
    USUAL,
    Chosen,
    ChosenOperators,
    as_recorded,
    by_rule,
    kept,
    quickest,
)
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.registry import AUTO, DEFAULT_VARIANTS

USUAL_ONES = {operator: Chosen(default, USUAL) for operator, default in DEFAULT_VARIANTS.items()}
BEFORE = ChosenOperators("a chip", {**USUAL_ONES, "attention": Chosen("blocks", MEASURED, {"blocks": 1.0, "kernel": 2.0})})


@pytest.mark.parametrize(
    ("usual", "times", "variant", "why"),
    [
        (["kernel"], [{"blocks": 0.9, "kernel": 1.0}], "blocks", MEASURED),
        (["kernel"], [{"blocks": 0.985, "kernel": 1.0}], "kernel", USUAL),  # no more than noise
        (["blocks"], [{"blocks": 1.0, "kernel": 0.9}], "kernel", MEASURED),
        (["blocks", "kernel"], [{"blocks": 1.0, "kernel": 3.0}, {"blocks": 3.0, "kernel": 1.0}], AUTO, USUAL),
        (["blocks", "kernel"], [{"blocks": 1.0, "kernel": 3.0}, {"blocks": 0.5, "kernel": 1.0}], "blocks", MEASURED),
        (["kernel"], [{"kernel": 1.0, "vendor": 0.2}, {"kernel": 1.0}][:1], "vendor", MEASURED),
        (["kernel", "kernel"], [{"kernel": 1.0, "vendor": 0.2}, {"kernel": 1.0}], "kernel", USUAL),  # it fails for some
    ],
)
def test_another_than_the_usual_variant_must_be_clearly_quicker(
    usual: list[str], times: list[dict[str, float]], variant: str, why: str
) -> None:
    chosen = quickest(usual, times)
    assert (chosen.variant, chosen.why) == (variant, why)
    assert chosen.seconds["kernel"] == sum(of_kind["kernel"] for of_kind in times)


def test_without_times_each_kind_of_calls_has_its_usual_variant() -> None:
    assert by_rule(["blocks", "blocks"]) == Chosen("blocks", USUAL)
    assert by_rule(["blocks", "kernel"]) == Chosen(AUTO, USUAL)


def test_a_new_run_has_only_what_its_recipe_names() -> None:
    assert kept(None, OperatorsConfig(), "cpu", "a chip", "float32") == ({}, [])
    assert kept(None, OperatorsConfig(attention="blocks"), "cpu", "a chip", "float32") == (
        {"attention": Chosen("blocks", GIVEN)},
        [],
    )


def test_a_resumed_run_keeps_what_it_has_recorded() -> None:
    assert kept(BEFORE, OperatorsConfig(), "cpu", "a chip", "float32") == (BEFORE.operators, [])
    assert kept(BEFORE, OperatorsConfig(attention="blocks"), "cpu", "a chip", "float32") == (BEFORE.operators, [])


def test_a_variant_that_the_recipe_names_takes_the_place_of_the_recorded_one_and_is_said() -> None:
    settled, remarks = kept(BEFORE, OperatorsConfig(attention="kernel"), "cpu", "a chip", "float32")
    assert settled == {**BEFORE.operators, "attention": Chosen("kernel", GIVEN)}
    assert remarks == ["operators.attention=kernel, as given; so far the run had blocks"]


def test_another_chip_is_said_and_changes_nothing() -> None:
    settled, (remark,) = kept(BEFORE, OperatorsConfig(), "cpu", "another chip", "float32")
    assert settled == BEFORE.operators
    assert remark.startswith("the run chose its operators on a chip, is on another chip now and keeps operators.norm=eager")
    assert remark.endswith("operators.loss=eager, operators.linear=torch, operators.update=fused; name another to change it")


def test_a_chip_without_the_recorded_variant_has_the_default() -> None:
    settled, (first, second) = kept(BEFORE, OperatorsConfig(), "cuda", "a GPU", "float32")
    assert settled == USUAL_ONES
    assert first == "operators.attention=kernel: a GPU has no blocks, with which the run began"
    assert "attention" not in second


def test_a_run_in_float8_without_the_recorded_variant_stays_in_float8() -> None:
    before = ChosenOperators("a chip", {**BEFORE.operators, "linear": Chosen("float8_of_a_package", GIVEN)})
    settled, (remark,) = kept(before, OperatorsConfig(), "cpu", "a chip", "float8")
    assert settled["linear"] == Chosen("float8_rowwise", USUAL)
    assert remark == "operators.linear=float8_rowwise: a chip has no float8_of_a_package, with which the run began"


def test_it_is_recorded_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "operators.json"
    assert ChosenOperators.read(path) is None
    path.write_text(json.dumps(BEFORE.to_json()))
    assert ChosenOperators.read(path) == BEFORE
    assert BEFORE.as_config() == OperatorsConfig(*["eager"] * 3, "blocks", "eager", "torch", "fused")


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", '{"chip": "x", "operators": {"norm": 1}}', '{"chip": "x", "operators": []}']
)
def test_a_damaged_record_is_said_to_be_one(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "operators.json"
    path.write_text(damage)
    with pytest.raises(ValueError, match=r"\S"):
        ChosenOperators.read(path)


def test_a_model_is_computed_as_its_run_did_where_the_chip_can(tmp_path: Path) -> None:
    path = tmp_path / "operators.json"
    given = OperatorsConfig(norm="eager")
    assert as_recorded(path, given, "cpu", "float32") == given
    path.write_text(json.dumps(BEFORE.to_json()))
    assert as_recorded(path, given, "cpu", "float32") == BEFORE.as_config()
    assert as_recorded(path, given, "cuda", "float32").attention == "kernel"
    assert as_recorded(path, replace(given, attention="kernel"), "cpu", "float32").attention == "kernel"


def test_a_model_needs_no_generated_kernels_after_its_run(tmp_path: Path) -> None:
    """They take longer to generate than most texts."""
    path = tmp_path / "operators.json"
    generated = ChosenOperators("a chip", {**BEFORE.operators, "norm": Chosen("generated", GIVEN)})
    path.write_text(json.dumps(generated.to_json()))
    assert as_recorded(path, OperatorsConfig(), "cpu", "float32") == replace(BEFORE.as_config(), norm=AUTO)
