"""`-m`: makes a recipe for every combination of the given values, each with its own run directory."""

import hashlib
import itertools
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from bagualu.comm.errors import RecipeError
from bagualu.trainer.recipe.compose import compose, parse
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.override_text import typed

_LONGEST_NAME = 200
"""The most bytes that the values of a job add to its folder's name; file systems allow 255 for the whole name."""


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep."""

    overrides: list[str]
    """The command-line overrides that produce `recipe`, including run.dir."""
    recipe: Recipe


def jobs(overrides: Sequence[str]) -> list[SweepJob]:
    """Returns the jobs of a sweep, one for each combination of values; the last key with several values varies fastest. Raises
    RecipeError."""
    parsed = parse(overrides)
    values = {override.get_key_element(): _values(override) for override in parsed}
    swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
    if not swept:
        raise RecipeError("-m was given but no key has several values; give e.g. optim.lr=1e-3,3e-4")
    named = not swept & {"run.dir", "++run.dir"}
    by_folder: dict[str, SweepJob] = {}
    for combination in itertools.product(*map(_distinct, values.values())):
        own = [text for key, text in zip(values, combination, strict=True) if key in swept]
        recipe = compose(combination)
        if named:
            recipe.run.dir = _free(recipe.run.dir, own, by_folder)
        if recipe.run.dir in by_folder:
            raise RecipeError(f"two jobs of the sweep share {recipe.run.dir}; leave run.dir out of the sweep")
        others = [text for text in combination if not text.startswith("run.dir=")]
        by_folder[recipe.run.dir] = SweepJob([*others, f"run.dir={typed(recipe.run.dir)}"], recipe)
    return list(by_folder.values())


def _values(override: Override) -> list[str]:
    """Returns a list with an override, as text, for each value of `override`. Raises RecipeError when the values cannot be
    listed."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
        raise RecipeError(f"{override.input_line} does not list its values; give them, e.g. optim.lr=1e-3,3e-4")
    try:
        values = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except (HydraException, ValueError) as error:
        raise RecipeError(f"{override.input_line} cannot be listed ({error}); give the values, e.g. optim.lr=1e-3,3e-4") from error
    if not values:
        raise RecipeError(f"{override.input_line} stands for no value; give at least one, e.g. train.steps=range(100,300,100)")
    return values


def _distinct(values: list[str]) -> list[str]:
    for value in values:
        if values.count(value) > 1 and not value.startswith("run.dir="):
            raise RecipeError(f"the sweep has {value} twice; give each value once")
    return values


def _free(folder: str, own: list[str], taken: Container[str]) -> str:
    """Returns `folder` with the job's values `own` appended to its name. If they are too long or the name is in `taken`, appends
    the beginning of the values and a hash of all."""
    plain = ",".join(re.sub(r"[^\w.=-]+", "_", _without_quotes(text)) for text in own)
    short = plain.encode()[: _LONGEST_NAME // 2].decode(errors="ignore")
    distinct = f"{folder}-{short}-{hashlib.blake2b(repr(own).encode(), digest_size=4).hexdigest()}"
    return distinct if len(plain.encode()) > _LONGEST_NAME or f"{folder}-{plain}" in taken else f"{folder}-{plain}"


def _without_quotes(text: str) -> str:
    (override,) = parse([text])
    value = override.value()
    return f"{override.get_key_element()}={value}" if isinstance(value, str) else text
