"""Decides which checkpoints are kept and removes the others."""

from collections.abc import Collection
from pathlib import Path

from bagualu.fault_tolerance.checkpoint.layout.directory import discard, list_checkpoints
from bagualu.fault_tolerance.checkpoint.reading.inspect import is_whole


def prune(root: Path, keep: int, just_saved: Path, damaged: Collection[str] = ()) -> None:
    """Removes old checkpoints: keeps the newest `keep` whole ones and everything newer than the oldest of those.

    A damaged checkpoint, according to a quick check or to `damaged` (names), does not count towards `keep`. `just_saved` is never
    removed. Raises CheckpointError.
    """
    whole = 0
    for path in reversed(list_checkpoints(root)):
        if whole >= keep and path != just_saved:
            discard(path)
        elif whole < keep:
            whole += path == just_saved or (path.name not in damaged and is_whole(path))
