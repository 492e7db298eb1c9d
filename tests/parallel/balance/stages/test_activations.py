"""What train.recompute means for each layer; tests/trainer/recipe/test_config.py holds what is refused."""

from typing import Any

import pytest

from bagualu.parallel.balance.stages.activations import Activations, read_activations

MIXTURES = [False, True, False, True, True]


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [
        ("none", ["none"] * 5),
        ("full", ["full"] * 5),
        ("attention", ["attention"] * 5),
        ("experts", ["none", "experts", "none", "experts", "experts"]),
        ("every:1", ["full"] * 5),
        ("every:2", ["full", "none", "full", "none", "full"]),
        ("every:3", ["full", "none", "none", "full", "none"]),
        ([1, 4], ["none", "full", "none", "none", "full"]),
        ((4,), ["none"] * 4 + ["full"]),
    ],
)
def test_every_layer_has_its_part(recompute: Any, expected: list[str]) -> None:
    found = read_activations(recompute, 0, MIXTURES)
    assert [found.of_layer(layer) for layer in range(5)] == expected


def test_what_is_not_left_to_choice_stays() -> None:
    assert Activations().of_layer(1, frozenset([1])) == "none"
    assert Activations(("none", "attention")).of_layer(1, frozenset([1])) == "attention"


@pytest.mark.parametrize(("recompute", "most"), [("auto", None), ("bytes:12", 12)])
def test_layers_are_left_to_choice(recompute: str, most: int | None) -> None:
    found = read_activations(recompute, 7, MIXTURES)
    assert found == Activations(None, most, 7)
    assert [found.of_layer(layer, frozenset([1, 2])) for layer in range(4)] == ["none", "full", "full", "none"]
