"""Checks of recipe values. Every error message names the key, its value and a value that works."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from bagualu.comm.errors import RecipeError


def require_at_least(least: float, section: str, part: Any, *names: str) -> None:
    """Raises RecipeError if any of `part`'s fields `names` is below `least`. A field that is None is not checked. `section` is the
    key of `part` in the recipe, for the message."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value < least:
            default = getattr(type(part)(), name)
            works = "or leave it out" if default is None else f"e.g. {section}.{name}={max(default, least)}"
            raise RecipeError(f"{section}.{name}={value} must be at least {least}, {works}")


def require_at_most(most: float, section: str, part: Any, *names: str) -> None:
    """Raises RecipeError if any of `part`'s fields `names` is above `most`. A field that is None is not checked. `section` is the
    key of `part` in the recipe, for the message."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value > most:
            raise RecipeError(f"{section}.{name}={value} must be at most {most}; give {section}.{name}={most} or less")


def require_finite(recipe: Any) -> None:
    """Raises RecipeError if any value in `recipe`, a tree of dataclasses, is infinite, NaN, or a list that contains such a
    number."""
    for key, value, default in _keys(recipe, ""):
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            works = f"give {key}={default}" if default is not None else "leave it out"
            raise RecipeError(f"{key}={value} is not a finite number; {works}")


def _keys(section: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields (full key, value, default) for every field of `section` and its subsections that is not itself a section."""
    unchanged = type(section)()
    for field in fields(section):
        key, value = prefix + str(field.metadata.get("key", field.name)), getattr(section, field.name)
        if is_dataclass(value):
            yield from _keys(value, f"{key}.")
        else:
            yield key, value, getattr(unchanged, field.name)


RANGES = {
    "float64": (2.2250738585072014e-308, 1.7976931348623157e308),
    "float32": (1.1754943508222875e-38, 3.4028234663852886e38),
    "bfloat16": (1.1754943508222875e-38, 3.3895313892515355e38),
    "float16": (6.103515625e-05, 65504.0),
}
"""For each dtype, its smallest positive normal number and its largest number."""


def require_representable(section: str, part: Any, dtype: str, *names: str, zero: bool = True) -> None:
    """Raises RecipeError if any of `part`'s fields `names` is not a positive normal number of `dtype`: too small, negative, or too
    large.

    `zero` says whether the value 0 is allowed.
    """
    least, most = RANGES[dtype]
    for name in names:
        value = getattr(part, name)
        if (value or not zero) and not least <= value <= most:
            default = getattr(type(part)(), name)
            problem = "is too large for" if value > most else "is zero, or nearly so, in"
            raise RecipeError(f"{section}.{name}={value} {problem} {dtype}, in which it is computed with: it must lie between "
                              f"{least:.3g} and {most:.3g}; give {section}.{name}={default}")  # fmt: skip


def require_text(section: str, part: Any, **examples: str) -> None:
    """Raises RecipeError if a text field of `part` that `examples` names is empty or only white space; the message offers
    `examples[name]`."""
    for name, example in examples.items():
        if not getattr(part, name).strip():
            raise RecipeError(f"{section}.{name} is empty; give a value, e.g. {section}.{name}={example}")


def require_known_home(section: str, part: Any, *names: str) -> None:
    """Raises RecipeError if a path in any of `part`'s fields `names` still begins with `~`: the home directory of an unknown user,
    since others have been expanded before."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value.startswith("~"):  # the home directory of a known user has been expanded before
            raise RecipeError(f"{section}.{name}={value}: {value.split('/')[0]} is no user's home directory here; give a path, "
                              f"e.g. {section}.{name}=./{value} for a folder of that name")  # fmt: skip


def refuse_unused(section: str, part: Any, names: list[str], reason: str) -> None:
    """Raises RecipeError if any of `part`'s fields `names` was changed from its default although it has no effect.

    `reason` is the setting that makes them ineffective, e.g. "model.moe.experts=0".
    """
    unchanged = type(part)()
    for name in names:
        value, default = getattr(part, name), getattr(unchanged, name)
        if value != default:
            key = reason.split("=")[0]
            fix = "leave it out" if default is None else f"give {section}.{name}={default}"
            raise RecipeError(f"{section}.{name}={value} has no effect with {reason}; change {key} or {fix}")
