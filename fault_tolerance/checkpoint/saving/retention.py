"""Decides which checkpoints are kept and removes the others."""

from collections.abc import Collection
from pathlib import Path

from bagualu.fault_tolerance.checkpoint.layout.directory import discard, list_checkpoints
from bagualu.fault_tolerance.checkpoint.reading.inspect import is_whole


def prune(root: Path, keep: int, just_saved: Path, damaged: Collection[str] = ()) -> None:
    """Removes old checkpoints: keeps the newest `keep` undamaged checkpoints and all checkpoints, even damaged ones, that are newer
    than the oldest of those.

    A checkpoint is damaged if a quick check finds a problem or `damaged` contains its name; `just_saved` is taken to be undamaged
    and is never removed. Raises CheckpointError if a checkpoint cannot be removed.
    """
    whole = 0
    for path in reversed(list_checkpoints(root)):
        if whole >= keep and path != just_saved:
            discard(path)
        elif whole < keep:
            whole += path == just_saved or (path.name not in damaged and is_whole(path))
