"""Renames damaged checkpoints that a run skipped when it resumed, so that checkpoints of the same steps can be saved."""

import os
import secrets
from pathlib import Path

from bagualu.fault_tolerance.checkpoint.layout.durable import fsync_directory

_DAMAGED = "damaged-"


def set_aside(path: Path) -> Path:
    """Renames the checkpoint at `path` to a name that is no checkpoint's; returns the new path. Renaming it back restores it.

    Raises OSError.
    """
    aside = path.with_name(f"{_DAMAGED}{path.name}-{secrets.token_hex(4)}")
    os.rename(path, aside)
    fsync_directory(path.parent)
    return aside


def list_set_aside(root: Path) -> list[Path]:
    """Returns the checkpoints under `root` that `set_aside` has renamed, sorted by name."""
    return sorted(root.glob(f"{_DAMAGED}step-*"))
