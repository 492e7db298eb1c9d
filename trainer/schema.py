"""The recipe as Hydra and YAML see it: the dataclasses' keys, types and defaults, with every key as people type it. Free of torch.

A field whose key is no name in Python (checkpoint.async) gives the key in its metadata; nobody else has to know.
"""

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from bagualu.trainer.config import Recipe


def key_of(field: Field[Any]) -> str:
    """What people type for a field."""
    return str(field.metadata.get("key", field.name))


def schema(recipe: Recipe | type[Recipe] = Recipe) -> DictConfig:
    """A recipe, or the defaults, as a tree that takes no other keys and no values of another type."""
    return _spelled(OmegaConf.structured(recipe), Recipe)


def to_recipe(config: Any) -> Recipe:
    """The recipe in a tree made from `schema`. Raises OmegaConfBaseException for values that it cannot have."""
    plain = OmegaConf.to_container(config, resolve=True)
    recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), _named(plain, Recipe)))
    assert isinstance(recipe, Recipe)
    return recipe


def _spelled(node: Any, section: type[Any]) -> DictConfig:
    """A section as a tree of typed values, by key."""
    hints, content = get_type_hints(section), {}
    for field in fields(section):
        child = node._get_node(field.name)
        content[key_of(field)] = _spelled(child, hints[field.name]) if is_dataclass(hints[field.name]) else child
    return DictConfig(content, flags={"struct": True})


def _named(values: Any, section: type[Any]) -> Any:
    """Plain values of a section by the names of its fields."""
    if not isinstance(values, Mapping):
        return values
    hints, by_key = get_type_hints(section), {key_of(field): field.name for field in fields(section)}
    named = {by_key.get(str(key), str(key)): value for key, value in values.items()}
    return {name: _named(value, hints[name]) if is_dataclass(hints.get(name)) else value for name, value in named.items()}
