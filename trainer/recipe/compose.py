"""Makes a `Recipe` from the overrides that the user typed: Hydra composes it, and every refusal is a single line with the fix.

The schema is made from the dataclass `Recipe`, so unknown keys and values of the wrong type are refused. The overrides are checked
one after the other before Hydra composes, because only then is it known which of them is wrong.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from bagualu.comm.config import AUTO
from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.files import write_atomic
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.trainer.data.config import RANDOM
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.keys import CLUSTER, GROUPS, SEARCHPATH, check_key, check_override, kind_of
from bagualu.trainer.recipe.origin import kept_tokenizer, tokenizer_of, with_origin
from bagualu.trainer.recipe.override_text import ValueKind, escaped, quoted, spelled
from bagualu.trainer.recipe.plain import plain
from bagualu.trainer.recipe.schema import schema, to_recipe
from bagualu.trainer.recipe.yaml_text import keep_text_in_recipe_files, read_yaml, write_yaml

RECIPES = "bagualu.recipes"
_BASE = "base"
"""The name under which Hydra finds the recipe that overrides change, if it is none of recipes/."""

ONE_VALUE = "one run takes one value of each key; `bagualu train -m` runs several one after the other"


def compose(overrides: Sequence[str], several: str = ONE_VALUE, base: Recipe | None = None) -> Recipe:
    """Returns the recipe that `overrides`, in Hydra's override grammar, select and change. Raises RecipeError.

    `several` is the advice to print if a key is given several values, which a single recipe cannot have. `base` is the recipe that
    they change; left out, it is that of the run that they resume, if they name no recipe themselves, else that of recipes/.
    """
    parsed = parse(overrides)
    own_recipes = any(override.key_or_group == SEARCHPATH for override in parsed)
    for override in parsed:
        if override.is_sweep_override():
            check_key(override)
            key = override.key_or_group
            comma = "" if kind_of(key) is ValueKind.OTHER else f", or quote a value that holds a comma: '{key}=\"a, b\"'"
            raise RecipeError(f"{override.input_line} gives several values; {several}{comma}")
        check_override(override, own_recipes)
    base = base or _recipe_of_resumed_run(parsed)
    _know_schema()
    if base is not None:
        ConfigStore.instance().store(name=_BASE, node=OmegaConf.merge(schema(), OmegaConf.create(_escaped(plain(base)))))
    keep_text_in_recipe_files()
    try:
        with initialize_config_module(RECIPES, version_base="1.3"):
            others = [_for_hydra(override) for override in parsed if override.key_or_group != CLUSTER]
            recipe = to_recipe(hydra_compose("config" if base is None else _BASE, overrides=others))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(_one_line(error)) from error
    for override in parsed:
        if override.key_or_group == CLUSTER:
            recipe.cluster = None if override.value() is None else os.path.expanduser(str(override.value()))
    recipe.faults = recipe.expanded_faults()
    given = {override.key_or_group for override in parsed}
    origin = recipe.model.origin
    if origin is not None and (base is None or "model.from" in given):  # a resumed run has the keys, perhaps no origin
        recipe.model = with_origin(recipe.model, given)
        # Text in other tokens would mean nothing to the model; that they are its tokens, somebody who names a file knows best.
        if "data.tokenizer" not in given and recipe.data.tokenizer is None and recipe.data.source != RANDOM:
            recipe.data.tokenizer = tokenizer_of(Path(origin))
    return recipe


@functools.cache
def _know_schema() -> None:
    """Lets recipe files name the schema, which Hydra then copies for each recipe."""
    ConfigStore.instance().store(name="schema", node=schema())


def require_resumed_run(overrides: Sequence[str]) -> None:
    """Raises RecipeError if `overrides` take their recipe from a run that is not there: nobody means to begin one with the recipe
    that is the default then."""
    config = _config_of_resumed_run(parse(overrides))
    if config is not None and not config.is_file():
        raise RecipeError(f"run.dir={config.parent} holds no run to go on with ({config.name} is missing); give the directory of a "
                          "run, or recipe=NAME to begin one there")  # fmt: skip


def _config_of_resumed_run(parsed: Sequence[Override]) -> Path | None:
    """Returns config.yaml of the run that the overrides resume, whether or not it exists: they give its run.dir and
    checkpoint.resume=true, and choose no recipe, model or data by name. None otherwise."""
    values = {override.key_or_group: override.value() for override in parsed}
    run_dir = values.get("run.dir")
    if values.get("checkpoint.resume") is not True or not isinstance(run_dir, str) or values.keys() & {*GROUPS}:
        return None
    return RunDirectory(os.path.expanduser(run_dir)).config


def _recipe_of_resumed_run(parsed: Sequence[Override]) -> Recipe | None:
    """Returns the recipe of the run that the overrides resume (`_config_of_resumed_run`); None if there is no such run. Raises
    RecipeError."""
    config = _config_of_resumed_run(parsed)
    if config is None or not config.is_file():
        return None
    recipe = load_recipe(config)
    recipe.data.tokenizer = kept_tokenizer(RunDirectory(config.parent), recipe.data.tokenizer)
    if recipe.comm.backend in ("gloo", "nccl"):  # perhaps what took the place of auto, which keeps it where this machine can
        recipe.comm.backend = AUTO
    return recipe


def parse(overrides: Sequence[str]) -> list[Override]:
    """Returns a list with every override as Hydra parses it, with text values as typed. Raises RecipeError for an override that
    cannot be read."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed.append(replace(parser.parse_override(_spelled(text)), input_line=text))
        except HydraException as error:
            raise _unreadable(text) from error
    return parsed


def _for_hydra(override: Override) -> str:
    """Returns the override as text for Hydra: text values are in quotes, and ~ is expanded in folders of recipes
    (hydra.searchpath). Raises RecipeError if one of those folders does not exist."""
    assert override.input_line is not None
    if override.key_or_group != SEARCHPATH:
        return _spelled(override.input_line)
    folders = [os.path.expanduser(str(folder).removeprefix("file://")) for folder in override.value()]
    for folder in folders:
        if "://" not in folder and not os.path.isdir(folder):
            raise RecipeError(f"{override.input_line}: {folder} is not a folder; give one that holds recipe/NAME.yaml")
    return f"{SEARCHPATH}=[{','.join(map(quoted, folders))}]"


def _spelled(override: str) -> str:
    """Returns the override in Hydra's grammar, so that Hydra reads its text values as typed. Raises RecipeError if it is not UTF-8
    or cannot be read."""
    if not override.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in override):
        raise RecipeError(f"{override!r} is not UTF-8 text; give it in UTF-8")
    try:
        return spelled(override, kind_of)
    except ValueError as error:
        raise _unreadable(override) from error


def _unreadable(override: str) -> RecipeError:
    return RecipeError(f"cannot read {override!r}; give key=value, e.g. train.steps=100, and quote a value with commas, brackets "
                       f"or quotes in it: 'key=\"a, b\"'")  # fmt: skip


def resolved_yaml(recipe: Recipe) -> str:
    """Returns the recipe, with every key, as YAML that reads back as exactly this recipe."""
    return write_yaml(_escaped(plain(recipe)))


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe as nested dictionaries of plain values, for JSON."""
    return plain(recipe)


def _escaped(value: Any) -> Any:
    """Returns a tree of plain values in which text is escaped so that OmegaConf sees no interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return escaped(value) if isinstance(value, str) else value


def save_recipe(recipe: Recipe) -> Path:
    """Writes the resolved recipe to config.yaml in the run directory, creates the directory if needed, and returns the path. Raises
    RecipeError if it cannot be written."""
    path = RunDirectory(recipe.run.dir).config
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, resolved_yaml(recipe).encode())  # every node of a run writes it
    except OSError as error:
        raise RecipeError(f"run.dir={recipe.run.dir} cannot be written ({error.strerror}: {error.filename}); make room there or "
                          "give another") from error  # fmt: skip
    return path


def load_recipe(path: Path) -> Recipe:
    """Returns the recipe in a run's config.yaml. Raises RecipeError if this version cannot read it as a recipe."""
    try:
        with path.open(encoding="utf-8") as file:
            return to_recipe(OmegaConf.merge(schema(), OmegaConf.create(read_yaml(file))))
    except Exception as error:  # a YAML error, an unknown key, a wrong type, an unreadable file
        first = str(error).strip().splitlines()[0]
        raise RecipeError(f"{path} is not a recipe this version can read ({first}); give another run.dir") from error


def _one_line(error: Exception) -> str:
    """Returns the message of an error of Hydra, OmegaConf or PyYAML as a single line with a fix, without its chain of causes."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}; correct the YAML there"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip() and "object_type=" not in line]
    return f"{' '.join(lines[:2])}; {_fix(cause)}"


def _fix(cause: Exception) -> str:
    if isinstance(cause, GrammarParseError | InterpolationResolutionError):
        return r"correct it, or write \${ in a text that is to hold ${"
    if isinstance(cause, MissingMandatoryValue):
        return "??? stands for a value that is missing; give that key a value"
    return "`bagualu train --help` lists recipes, --cfg job prints one"
