"""Which checkpoints stay. Free of torch."""

from collections.abc import Collection
from pathlib import Path

from bagualu.fault_tolerance.checkpoint.directory import discard, list_checkpoints
from bagualu.fault_tolerance.checkpoint.inspect import is_whole


def prune(root: Path, keep: int, just_saved: Path, damaged: Collection[str] = ()) -> None:
    """Leave the newest `keep` whole checkpoints and whatever is newer than the oldest of those; remove the rest.

    A damaged one (by a quick look, or because `damaged` has its name) does not count towards `keep`. `just_saved` is never removed.

    Raises CheckpointError.
    """
    whole = 0
    for path in reversed(list_checkpoints(root)):
        if whole >= keep and path != just_saved:
            discard(path)
        elif whole < keep:
            whole += path == just_saved or (path.name not in damaged and is_whole(path))
