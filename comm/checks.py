"""Checks that the parts of a recipe share, so that every refusal names the key, its value and one that works. Free of torch."""

from typing import Any

from bagualu.comm.errors import RecipeError


def require_at_least(least: float, section: str, part: Any, *names: str) -> None:
    """Refuse `section`.name below `least` for any of `names`; None passes, as left out. Raises RecipeError."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value < least:
            default = getattr(type(part)(), name)
            works = "or leave it out" if default is None else f"e.g. {section}.{name}={max(default, least)}"
            raise RecipeError(f"{section}.{name}={value} must be at least {least}, {works}")


def require_at_most(most: float, section: str, part: Any, *names: str) -> None:
    """Refuse `section`.name above `most` for any of `names`; None passes, as left out. Raises RecipeError."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value > most:
            raise RecipeError(f"{section}.{name}={value} must be at most {most}; give {section}.{name}={most} or less")


def require_text(section: str, part: Any, **examples: str) -> None:
    """Refuse an empty `section`.name for any name of `examples`. Raises RecipeError."""
    for name, example in examples.items():
        if not getattr(part, name).strip():
            raise RecipeError(f"{section}.{name} is empty; give one, e.g. {section}.{name}={example}")


def require_known_home(section: str, part: Any, *names: str) -> None:
    """Refuse a path `section`.name that begins with the home directory of nobody on this machine. Raises RecipeError."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value.startswith("~"):  # the home directory of a known user is spelt out by now
            raise RecipeError(f"{section}.{name}={value}: {value.split('/')[0]} is no user's home directory here; give a path, "
                              f"e.g. {section}.{name}=./{value} for a folder of that name")  # fmt: skip


def refuse_unused(section: str, part: Any, names: list[str], reason: str) -> None:
    """Refuse keys that were changed although `reason` (e.g. "model.moe.experts=0") leaves them without effect.

    Raises RecipeError.
    """
    unchanged = type(part)()
    for name in names:
        value, default = getattr(part, name), getattr(unchanged, name)
        if value != default:
            key = reason.split("=")[0]
            raise RecipeError(
                f"{section}.{name}={value} has no effect with {reason}; change {key} or give {section}.{name}={default}"
            )
