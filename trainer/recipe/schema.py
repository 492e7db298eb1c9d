"""The recipe as Hydra and YAML see it: the dataclasses' keys, types and defaults, with every key as people type it. Free of torch.

A field whose key is no name in Python (checkpoint.async) gives the key in its metadata; nobody else has to know. A field that
holds a path says so there too, and ~ and ~user at its start become that home directory, here and nowhere else.
"""

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.plain import key_of


def schema() -> DictConfig:
    """The defaults as a tree that takes no other keys and no values of another type."""
    return _spelled(OmegaConf.structured(Recipe), Recipe)


def to_recipe(config: Any) -> Recipe:
    """The recipe in a tree made from `schema`, paths from the home directory spelt out.

    Raises OmegaConfBaseException for values that it cannot have.
    """
    values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    recipe: Recipe = _built(Recipe, values)
    return recipe


def _spelled(node: Any, section: type[Any]) -> DictConfig:
    """A section as a tree of typed values, by key."""
    hints, content = get_type_hints(section), {}
    for field in fields(section):
        child = node._get_node(field.name)
        content[key_of(field)] = _spelled(child, hints[field.name]) if is_dataclass(hints[field.name]) else child
    return DictConfig(content, flags={"struct": True})


def _built(section: type[Any], values: Mapping[Any, Any]) -> Any:
    """A section from its plain values by key."""
    hints, content = get_type_hints(section), {}
    for field in fields(section):
        value = values[key_of(field)]
        if is_dataclass(hints[field.name]):
            value = _built(hints[field.name], value)
        elif field.metadata.get("path") and value is not None:
            value = os.path.expanduser(value)
        content[field.name] = value
    return section(**content)
