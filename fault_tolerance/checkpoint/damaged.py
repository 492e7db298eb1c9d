"""Checkpoints that a run has found damaged and gone back behind: renamed, so that their steps can be saved again. Free of torch."""

import os
import secrets
from pathlib import Path

from bagualu.fault_tolerance.checkpoint.durable import fsync_directory

_DAMAGED = "damaged-"


def set_aside(path: Path) -> Path:
    """Rename the checkpoint at `path`, which is none from then on; its new path. Nothing else touches it: `mv` brings it back.

    Raises OSError.
    """
    aside = path.with_name(f"{_DAMAGED}{path.name}-{secrets.token_hex(4)}")
    os.rename(path, aside)
    fsync_directory(path.parent)
    return aside


def list_set_aside(root: Path) -> list[Path]:
    """What `set_aside` has renamed under `root`."""
    return sorted(root.glob(f"{_DAMAGED}step-*"))
