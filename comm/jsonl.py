"""Reads files with a JSON object per line that a crash, a full disk or a power failure may have damaged."""

import json
import re
from pathlib import Path
from typing import Any

_SEPARATORS = re.compile(rb"[\n\0]+")
"""A power failure can leave zero bytes where a file had grown; the text before and after them counts as separate lines."""


def lines(data: bytes) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Returns the non-blank lines of `data`, without line ends, each with its object or, if it is not a whole object, None."""
    return [(line, _object(line)) for line in _SEPARATORS.split(data) if line.strip()]


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the whole objects of a file in order; [] if there is no file. Skips damaged lines. Raises OSError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [value for _, value in lines(data) if value is not None]


def number(value: Any) -> bool:
    """Whether a JSON value is a finite number; booleans are not numbers."""
    return type(value) is int or (type(value) is float and abs(value) < float("inf"))


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
