"""Reading files of JSON objects, one a line, that a crash, a full disk or a power cut may have damaged. Free of torch."""

import json
import re
from pathlib import Path
from typing import Any

_SEPARATORS = re.compile(rb"[\n\0]+")
"""A power cut can leave zero bytes where a file had grown; what stands on both sides of them is as good as separate lines."""


def lines(data: bytes) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The lines of `data` that are not blank, without their ends, each with its object; None where it is not a whole object."""
    return [(line, _object(line)) for line in _SEPARATORS.split(data) if line.strip()]


def read(path: Path) -> list[dict[str, Any]]:
    """The whole objects of a file in their order; [] when there is no file. Damaged lines are passed over. Raises OSError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [found for _, found in lines(data) if found is not None]


def number(value: Any) -> bool:
    """Whether a JSON value is a finite number (and not a truth value)."""
    return type(value) is int or (type(value) is float and abs(value) < float("inf"))


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
