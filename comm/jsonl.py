"""Writes standard JSON, and reads files with one object per line even if a crash or a full disk has damaged some lines."""

import json
import math
import re
from pathlib import Path
from typing import Any

_SEPARATORS = re.compile(rb"[\n\0]+")
"""What separates lines: line ends, and zero bytes, which a power failure can leave where a file had grown."""


def lines(data: bytes) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Returns (line without its end, its JSON object) for every non-blank line of `data`; None instead of the object if the line is
    damaged."""
    return [(line, _object(line)) for line in _SEPARATORS.split(data) if line.strip()]


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the JSON objects in the undamaged lines of a file, in order; [] if there is no file. Raises OSError if the file
    cannot be read."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [value for _, value in lines(data) if value is not None]


def number(value: Any) -> bool:
    """Returns whether a JSON value is a finite number; booleans are not numbers."""
    return type(value) is int or (type(value) is float and abs(value) < float("inf"))


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def dumps(value: Any, indent: int | None = None) -> str:
    """Returns `value` as JSON, with null in place of every float that is not finite. (NaN is not valid JSON; other programs fail on
    it.)"""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
