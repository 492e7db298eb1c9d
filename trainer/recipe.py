"""From what was typed to a `Recipe`: Hydra composes, every refusal is one line with the fix. Free of torch.

The schema is the dataclass `Recipe` itself, so a key that is not a field and a value of the wrong type cannot get in. The
overrides are looked at one by one before Hydra sees them, because only then is it known which of them is at fault.
"""

import re
import secrets
from collections.abc import Sequence
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
from omegaconf.errors import OmegaConfBaseException

from bagualu.comm.errors import RecipeError
from bagualu.trainer.config import Recipe
from bagualu.trainer.recipe_keys import check_override
from bagualu.trainer.schema import schema, to_recipe

RECIPES = "bagualu.recipes"
RESOLVED = "config.yaml"
"""Name of the resolved recipe in a run directory."""


def compose(overrides: Sequence[str]) -> Recipe:
    """The recipe that `overrides` (Hydra's override grammar) select and change. Raises RecipeError."""
    parsed = parse(overrides)
    own_recipes = any(override.key_or_group == "hydra.searchpath" for override in parsed)
    for override in parsed:
        if override.is_sweep_override():
            raise RecipeError(f"{override.input_line} gives several values; add -m to run them one after the other, "
                              f"or quote a value that holds a comma: '{override.key_or_group}=\"...\"'")  # fmt: skip
        check_override(override, own_recipes)
    ConfigStore.instance().store(name="schema", node=schema())
    try:
        with initialize_config_module(RECIPES, version_base="1.3"):
            recipe = to_recipe(hydra_compose("config", overrides=[_quoted(text) for text in overrides]))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(_one_line(error)) from error
    recipe.faults = recipe.expanded_faults()
    return recipe


def parse(overrides: Sequence[str]) -> list[Override]:
    """Every override as Hydra reads it. Raises RecipeError for one that it cannot read."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(_quoted(text)))
        except HydraException as error:
            raise RecipeError(f"cannot read {text!r}; give key=value, e.g. train.steps=100, and quote a value with "
                              f"commas, brackets or spaces: 'key=\"a, b\"'") from error  # fmt: skip
    return parsed


_QUOTED_OR_CALL = r"""("(?:\\.|[^"])*"|'(?:\\.|[^'])*'|\w+\([^)]*\))"""
_ODD_WORD = r"""([^\s\[\]{},"'()=~]*[=~][^\s\[\]{},"'()]*)"""


def _quoted(text: str) -> str:
    """An override with the words of its value that hold a = or ~ in quotes, which Hydra's grammar wants: key=[--mem=4G, ~/text]."""
    key, equals, value = text.partition("=")
    return key + equals + re.sub(f"{_QUOTED_OR_CALL}|{_ODD_WORD}", lambda m: m[1] or f'"{m[2]}"', value)


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every key spelt out, as YAML."""
    return OmegaConf.to_yaml(schema(recipe), resolve=True)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dictionaries of plain values, for JSON."""
    plain = OmegaConf.to_container(schema(recipe), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def save_recipe(recipe: Recipe) -> Path:
    """Write config.yaml, the resolved recipe, into the run directory, which is made if need be."""
    path = Path(recipe.run.dir) / RESOLVED
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".yaml.{secrets.token_hex(4)}")  # every node of a run writes it
    unfinished.write_text(resolved_yaml(recipe), encoding="utf-8")
    unfinished.replace(path)
    return path


def load_recipe(path: Path) -> Recipe:
    """The recipe in a run's config.yaml. Raises RecipeError when it is none, or one of another version."""
    try:
        return to_recipe(OmegaConf.merge(schema(), OmegaConf.load(path)))
    except Exception as error:  # a YAML error, an unknown key, a wrong type, an unreadable file
        first = str(error).strip().splitlines()[0]
        raise RecipeError(f"{path} is not a recipe this version can read ({first}); give another run.dir") from error


def _one_line(error: Exception) -> str:
    """What Hydra or OmegaConf said, without its stack of causes, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}; correct the YAML there"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip() and "object_type=" not in line]
    return f"{' '.join(lines[:2])}; `bagualu train --help` lists recipes, --cfg job prints one"
