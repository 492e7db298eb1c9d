"""Lists the keys of a recipe, taken from the dataclasses, and refuses overrides that do not fit them."""

import functools
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from importlib.resources import files
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bagualu.comm.errors import RecipeError
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.override_text import ValueKind, typed
from bagualu.trainer.recipe.plain import key_of
from bagualu.trainer.recipe.schema import schema

GROUPS = ("recipe", "model", "data")
"""Folders of recipes/ from which the user chooses a file by `group=option`."""
SEARCHPATH = "hydra.searchpath"
"""The only key of Hydra itself that is accepted: folders with the user's own recipes."""
CLUSTER = "cluster"
"""The key that has the name of a folder of recipes/: Hydra would take it for a group of its files, so it never sees it."""
_TEXT_OR_LIST = ("faults",)
"""Keys that take text or a list of text although their type in `Recipe` is Any."""
TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def options(group: str) -> list[str]:
    """Returns the choices of a group: the names of the files in its folder of Bagualu's own recipes."""
    folder = files("bagualu.recipes") / group
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


@functools.cache
def keys() -> Mapping[str, Any]:
    """Returns every leaf key with its type, e.g. {"model.moe.experts": int}. It is always the same mapping."""
    return {key: hint for key, hint, _ in _leaves(Recipe)}


def _leaves(node: type[Any], prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Yields (key, type, field) of every leaf key."""
    hints = get_type_hints(node)
    for field in fields(node):
        if is_dataclass(hints[field.name]):
            yield from _leaves(hints[field.name], f"{prefix}{key_of(field)}.")
        else:
            yield prefix + key_of(field), hints[field.name], field


def kind_of(key: str) -> ValueKind:
    """Returns the kind of values that a key takes: TEXT for an unknown key, so that a message can show the value as typed, but
    OTHER for an unknown key below a known key, a group (GROUPS) or `hydra`."""
    if key in _kinds():
        return _kinds()[key]
    inside = any(key.startswith(f"{known}.") for known in ("hydra", *_kinds()))
    return ValueKind.OTHER if inside else ValueKind.TEXT


@functools.cache
def _kinds() -> dict[str, ValueKind]:
    kinds = {key: _kind(hint) for key, hint in keys().items()}
    return kinds | {SEARCHPATH: ValueKind.TEXT} | dict.fromkeys((*GROUPS, *_TEXT_OR_LIST), ValueKind.OPTIONAL_TEXT)


def _kind(hint: Any) -> ValueKind:
    """Returns the kind of values of a key with the type `hint`: TEXT for text or lists of text, OPTIONAL_TEXT if null is possible
    too, else OTHER."""
    parts = set(get_args(hint)) if isinstance(hint, UnionType) else {hint}
    items = {get_args(part)[0] if get_origin(part) is list else part for part in parts - {NoneType}}
    return ValueKind.OTHER if items != {str} else ValueKind.OPTIONAL_TEXT if NoneType in parts else ValueKind.TEXT


def check_key(override: Override) -> None:
    """Raises RecipeError if the override names no known key, section or group, names a key of Hydra itself, or would remove a
    key."""
    key, known = override.key_or_group, keys()
    if key.startswith("hydra.") and key != SEARCHPATH:
        raise RecipeError(f"{override.input_line}: the only key of Hydra itself that works here is {SEARCHPATH}")
    if override.type == OverrideType.DEL:
        raise RecipeError(f"{override.input_line} cannot remove a key; give {key}=null or another value")
    if key == "world":
        raise RecipeError(f"{override.input_line} is for `bagualu simulate`; a run has launch.nodes x launch.workers ranks, or the "
                          "product of its parallel degrees")  # fmt: skip
    if key not in known and key not in _sections() and key not in (SEARCHPATH, *GROUPS):
        raise RecipeError(f"unknown key {key}; {_nearest(key, list(known))}")


def check_override(override: Override, own_recipes: bool = False) -> None:
    """Raises RecipeError as `check_key` does, or if the override gives a value that the key cannot take.

    `own_recipes`: Hydra also searches folders of the user, so a group may have more options than this module knows.
    """
    check_key(override)
    key, value = override.key_or_group, override.value()
    if key == SEARCHPATH:
        if not isinstance(value, list):
            raise RecipeError(f"{override.input_line}: {key} takes a list of folders; give {key}=[{value}]")
        return None
    if key in GROUPS and not (isinstance(value, dict) and key in _sections()):
        return None if own_recipes and isinstance(value, str) else _check_choice(override, key, value)
    if key in _sections() and not isinstance(value, dict):
        inside = [name for name in keys() if name.startswith(key + ".")]
        raise RecipeError(f"{override.input_line}: {key} is a section; give one of its keys, e.g. {', '.join(inside[:4])}")
    return _check_values(override, value)


@functools.cache
def _sections() -> frozenset[str]:
    return frozenset(name.rsplit(".", count)[0] for name in keys() for count in range(1, name.count(".") + 1))


def _nearest(key: str, known: list[str]) -> str:
    """Returns advice on what to type instead of the unknown key `key`, given the `known` keys."""
    tail = key.rsplit(".", 1)[-1]
    same_tail = [name for name in known if name.rsplit(".", 1)[-1] == tail]
    near = get_close_matches(key, [*same_tail, *known], n=1, cutoff=0.75)
    tails = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    near_tail = [tails[name] for name in get_close_matches(tail, list(tails), n=1, cutoff=0.75)]
    holding = [name for name in known if len(tail) > 3 and tail in name.rsplit(".", 1)[-1]]
    suggestions = near or same_tail or near_tail or holding
    return f"did you mean {' or '.join(suggestions[:3])}?" if suggestions else "see all keys with --cfg job"


def _check_choice(override: Override, group: str, value: Any) -> None:
    known = options(group)
    if value not in known:
        near = get_close_matches(str(value), known, n=1)
        hint = f"did you mean {group}={near[0]}? " if near else ""
        raise RecipeError(f"{override.input_line} is unknown; {hint}There are {', '.join(known)}")


def _check_values(override: Override, value: Any) -> None:
    """Raises RecipeError for a value that its key cannot take. Values with an interpolation are left to Hydra."""
    if isinstance(value, str) and "${" in value:
        return
    key, given = override.key_or_group, repr(value) if isinstance(value, str) else override.input_line.partition("=")[2]
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{override.input_line}: {key} must be a finite number")
    if keys().get(key) is bool and not isinstance(value, bool | str):
        raise RecipeError(f"{override.input_line}: {key} takes true or false, not {given}")
    try:
        copy, name = _copy(key)
        OmegaConf.update(copy, name, value, merge=True)
    except (OmegaConfBaseException, ValueError) as error:
        if key not in keys():
            raise RecipeError(f"{override.input_line}: {str(error).splitlines()[0]}; give the keys one by one") from error
        example = f", e.g. {_example(key)}" if _example(key) else ""
        raise RecipeError(f"{override.input_line}: {key} takes {_expected(keys()[key])}, not {given}{example}") from error


def _copy(key: str) -> tuple[DictConfig, str]:
    """Returns a copy of the schema of this key alone, on which to try a value without affecting the next try, and its name there. A
    copy of all its section would take longer than the rest of the check."""
    section, _, name = key.rpartition(".")
    inside: Any = OmegaConf.select(schema(), section) if section else schema()
    return DictConfig({name: inside._get_node(name)}), name  # which copies the node, with its type


def _expected(hint: Any) -> str:
    if hint is Any:  # refused only for a dictionary in place of a list
        return "text or a list"
    if hint in TYPE_NAMES:
        return TYPE_NAMES[hint]
    inner = [argument for argument in getattr(hint, "__args__", ()) if argument is not type(None)]
    if getattr(hint, "__origin__", None) is list:
        return f"a list like [a,b] ({TYPE_NAMES[inner[0]]} each)" if inner[0] in TYPE_NAMES else "a list"
    return " or ".join([*(TYPE_NAMES.get(argument, str(argument)) for argument in inner), "null"])


def _example(key: str) -> str | None:
    """Returns an override of a leaf key, in quotes if a shell needs them, with the example of its field, or else with the default;
    None if that is null."""
    field = next(field for name, _, field in _leaves(Recipe) if name == key)
    if "example" in field.metadata:
        text = f"{key}={field.metadata['example']}"
        return shlex.quote(text) if " " in text else text
    default = OmegaConf.select(schema(), key)
    if default is None:
        return None
    return f"{key}={typed(OmegaConf.to_container(default) if OmegaConf.is_config(default) else default)}"
