"""Describes the recipe to Hydra and YAML: the keys, types and defaults of the dataclasses, with keys as the user types them.

A field whose key is no valid name in Python (checkpoint.async) has the key in its metadata; only this module and plain.py use it. A
field that holds a path is marked in its metadata too; only this module expands ~ and ~user at the start of a path. A field whose
default is no example of its values (0 for none) has one in its metadata, as typed, which keys.py shows.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.plain import key_of


@functools.cache
def schema() -> DictConfig:
    """Returns the defaults of all keys as an OmegaConf tree that refuses other keys and values of other types.

    It is always the same tree, so only a copy of it may be changed.
    """
    return _spelled(OmegaConf.structured(Recipe), Recipe)


def to_recipe(config: Any) -> Recipe:
    """Returns the recipe in a tree made from `schema`, with ~ at the start of paths expanded.

    Raises OmegaConfBaseException for invalid values.
    """
    values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    recipe: Recipe = _built(Recipe, values)
    return recipe


def _spelled(node: Any, section: type[Any]) -> DictConfig:
    """Returns the OmegaConf tree `node` of the dataclass `section` with each field under the key that the user types (`async` for
    `asynchronous`). The values keep their types, and the tree refuses other keys."""
    hints, content = get_type_hints(section), {}
    for field in fields(section):
        child = node._get_node(field.name)
        content[key_of(field)] = _spelled(child, hints[field.name]) if is_dataclass(hints[field.name]) else child
    return DictConfig(content, flags={"struct": True})


def _built(section: type[Any], values: Mapping[Any, Any]) -> Any:
    """Returns an instance of the dataclass `section`, given its plain values by key, with ~ expanded in paths."""
    hints, content = get_type_hints(section), {}
    for field in fields(section):
        value = values[key_of(field)]
        if is_dataclass(hints[field.name]):
            value = _built(hints[field.name], value)
        elif field.metadata.get("path") and value is not None:
            value = os.path.expanduser(value)
        content[field.name] = value
    return section(**content)
