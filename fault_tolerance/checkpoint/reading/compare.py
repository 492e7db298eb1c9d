"""Compares two checkpoints bit for bit, whatever layouts wrote them."""

from pathlib import Path
from typing import Any

import torch

from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint

_MAY_DIFFER = ("layout", "engine", "zero")
_GUARD_HISTORY = ("counts", "furthest", "setbacks")
"""Fields of metadata["guard"] that describe past bad steps and are not part of the training state; differences in them are
ignored."""

_MOST_SHOWN = 60
"""The most characters of each differing value that a line shows."""


def differences(left: Path, right: Path) -> list[str]:
    """Compares the checkpoints at two paths and returns a line per differing metadata key or tensor; [] if all are equal. Layout,
    engine and the guard's record of past bad steps may differ. Raises CheckpointError if one of them cannot be read.

    Only one tensor of each checkpoint is in memory at a time.
    """
    first, second = Checkpoint(left), Checkpoint(right)
    metadata, other_metadata = _state_metadata(first), _state_metadata(second)
    lines = [
        "metadata " + _first_difference(key, metadata.get(key), other_metadata.get(key))
        for key in sorted(metadata.keys() | other_metadata.keys())
        if metadata.get(key) != other_metadata.get(key)
    ]
    for name in sorted(first.tensors.keys() | second.tensors.keys()):
        if first.tensors.get(name) != second.tensors.get(name):
            lines.append(f"tensor {name}: {first.tensors.get(name)} and {second.tensors.get(name)}")
            continue
        count = int((_bytes(first, name) != _bytes(second, name)).sum())
        if count:
            lines.append(f"tensor {name}: {count} bytes differ")
    return lines


def _first_difference(key: str, left: Any, right: Any) -> str:
    """Returns a description of the first difference of two unequal JSON values, with its path from `key`."""
    if isinstance(left, dict) and isinstance(right, dict):
        inner = min(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
        return _first_difference(f"{key}.{inner}", left.get(inner), right.get(inner))
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        index = next(index for index, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1])
        return _first_difference(f"{key}[{index}]", left[index], right[index])
    return f"{key}: {str(left)[:_MOST_SHOWN]} and {str(right)[:_MOST_SHOWN]}"


def _bytes(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    shape, dtype = checkpoint.tensors[name]
    whole = torch.empty(shape, dtype=dtype)
    checkpoint.read(name, (0,) * len(shape), whole)
    return whole.reshape(-1).view(torch.uint8)


def _state_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the metadata without what may differ between two equal training states; of the guard's skipped steps only the
    numbers."""
    metadata = {key: value for key, value in checkpoint.metadata.items() if key not in _MAY_DIFFER}
    if isinstance(guard := metadata.get("guard"), dict):
        metadata["guard"] = {key: value for key, value in guard.items() if key not in _GUARD_HISTORY}
        metadata["guard"]["skipped_steps"] = sorted(guard.get("skipped_steps", ()))  # whatever the reason
    return metadata
