"""Whether two checkpoints hold the same state, bit for bit, whatever layouts wrote them."""

from pathlib import Path
from typing import Any

import torch

from bagualu.fault_tolerance.checkpoint.load import Checkpoint

_MAY_DIFFER = ("layout",)
_OF_TROUBLE = ("counts", "furthest", "setbacks")
"""What the guard has counted on the way, in metadata["guard"]: no part of where the run is."""

_MOST_SHOWN = 60
"""Characters of a value that differs."""


def differences(one: Path, other: Path) -> list[str]:
    """What differs, one line each; [] when nothing does. Holds one tensor of each in memory. Raises CheckpointError."""
    first, second = Checkpoint(one), Checkpoint(other)
    here, there = _said(first), _said(second)
    found = [
        "metadata " + _first_difference(key, here.get(key), there.get(key))
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
    for name in sorted(first.tensors.keys() | second.tensors.keys()):
        if first.tensors.get(name) != second.tensors.get(name):
            found.append(f"tensor {name}: {first.tensors.get(name)} and {second.tensors.get(name)}")
            continue
        count = int((_bytes(first, name) != _bytes(second, name)).sum())
        if count:
            found.append(f"tensor {name}: {count} bytes differ")
    return found


def _first_difference(key: str, one: Any, other: Any) -> str:
    """Of two unequal JSON values, with the way to it."""
    if isinstance(one, dict) and isinstance(other, dict):
        inner = min(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        return _first_difference(f"{key}.{inner}", one.get(inner), other.get(inner))
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        place = next(place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        return _first_difference(f"{key}[{place}]", one[place], other[place])
    return f"{key}: {str(one)[:_MOST_SHOWN]} and {str(other)[:_MOST_SHOWN]}"


def _bytes(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    shape, dtype = checkpoint.tensors[name]
    whole = torch.empty(shape, dtype=dtype)
    checkpoint.read(name, (0,) * len(shape), whole)
    return whole.reshape(-1).view(torch.uint8)


def _said(checkpoint: Checkpoint) -> dict[str, Any]:
    """Its metadata, as far as it tells where the run is."""
    said = {key: value for key, value in checkpoint.metadata.items() if key not in _MAY_DIFFER}
    if isinstance(guard := said.get("guard"), dict):
        said["guard"] = {key: value for key, value in guard.items() if key not in _OF_TROUBLE}
        said["guard"]["skipped_steps"] = sorted(guard.get("skipped_steps", ()))  # whatever the reason
    return said
