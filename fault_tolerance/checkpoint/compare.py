"""Whether two checkpoints hold the same state, bit for bit, whatever layouts wrote them."""

from pathlib import Path

import torch

from bagualu.fault_tolerance.checkpoint.load import Checkpoint

_MAY_DIFFER = ("layout",)


def differences(one: Path, other: Path) -> list[str]:
    """What differs, one line each; [] when nothing does. Holds one tensor of each in memory. Raises CheckpointError."""
    first, second = Checkpoint(one), Checkpoint(other)
    found = [
        f"metadata {key}: {first.metadata.get(key)} and {second.metadata.get(key)}"
        for key in sorted(first.metadata.keys() | second.metadata.keys())
        if key not in _MAY_DIFFER and first.metadata.get(key) != second.metadata.get(key)
    ]
    for name in sorted(first.tensors.keys() | second.tensors.keys()):
        if first.tensors.get(name) != second.tensors.get(name):
            found.append(f"tensor {name}: {first.tensors.get(name)} and {second.tensors.get(name)}")
            continue
        count = int((_bytes(first, name) != _bytes(second, name)).sum())
        if count:
            found.append(f"tensor {name}: {count} bytes differ")
    return found


def _bytes(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    shape, dtype = checkpoint.tensors[name]
    whole = torch.empty(shape, dtype=dtype)
    checkpoint.read(name, (0,) * len(shape), whole)
    return whole.reshape(-1).view(torch.uint8)
