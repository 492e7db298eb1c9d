"""Changes values of a recipe by their keys."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bagualu.trainer.recipe.config import Recipe


def changed(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Returns the recipe with `values`, by key, e.g. {"parallel.tensor": 2}."""
    for key, value in values.items():
        recipe = _with(recipe, key.split("."), value)
    return recipe


def value_of(recipe: Recipe, key: str) -> Any:
    """Returns the value of a key."""
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _with(config: Any, path: list[str], value: object) -> Any:
    """Returns `config` with `value` at `path`, the names of its sections and of a field."""
    first, *others = path
    return replace(config, **{first: _with(getattr(config, first), others, value) if others else value})
