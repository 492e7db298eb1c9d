"""Converts a recipe to nested dictionaries of plain values, with keys as the user types them. It does not import OmegaConf."""

from dataclasses import Field, fields, is_dataclass
from typing import Any


def key_of(field: Field[Any]) -> str:
    """Returns the name that the user types for a field, e.g. async for `asynchronous`, without the names of its sections."""
    return str(field.metadata.get("key", field.name))


def plain(section: Any) -> dict[str, Any]:
    """Returns a recipe, or a section of it, as nested dictionaries of plain values by key."""
    values = ((field, getattr(section, field.name)) for field in fields(section))
    return {key_of(field): plain(value) if is_dataclass(value) else value for field, value in values}
