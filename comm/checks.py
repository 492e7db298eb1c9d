"""Checks of recipe values. Every error message names the key, its value and a value that works."""

from typing import Any

from bagualu.comm.errors import RecipeError


def require_at_least(least: float, section: str, part: Any, *names: str) -> None:
    """Raises RecipeError if any of `part`'s fields `names` is below `least`. A field that is None was left out and passes."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value < least:
            default = getattr(type(part)(), name)
            works = "or leave it out" if default is None else f"e.g. {section}.{name}={max(default, least)}"
            raise RecipeError(f"{section}.{name}={value} must be at least {least}, {works}")


def require_at_most(most: float, section: str, part: Any, *names: str) -> None:
    """Raises RecipeError if any of `part`'s fields `names` is above `most`. A field that is None was left out and passes."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value > most:
            raise RecipeError(f"{section}.{name}={value} must be at most {most}; give {section}.{name}={most} or less")


def require_text(section: str, part: Any, **examples: str) -> None:
    """Raises RecipeError if a field of `part` that `examples` names is blank; the message offers the example."""
    for name, example in examples.items():
        if not getattr(part, name).strip():
            raise RecipeError(f"{section}.{name} is empty; give a value, e.g. {section}.{name}={example}")


def require_known_home(section: str, part: Any, *names: str) -> None:
    """Refuse a path `section`.name that begins with the home directory of nobody on this machine. Raises RecipeError."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value.startswith("~"):  # the home directory of a known user is spelt out by now
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
