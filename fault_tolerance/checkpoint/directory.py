"""The directory that holds a run's checkpoints: what counts as one, and how one disappears. Free of torch.

Committed is what is called `step-` and a number of at least eight digits; it got that name by one rename. Whatever else
lies there is never loaded. Names that begin with `.saving-` or `.removing-` are left over from a dead save or removal.
"""

import os
import secrets
import shutil
from pathlib import Path

from bagualu.fault_tolerance.checkpoint.durable import fsync_directory
from bagualu.fault_tolerance.checkpoint.format import CheckpointError, step_name, step_of

SAVING, _REMOVING = ".saving-", ".removing-"


def list_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoints under `root`, oldest step first. Damaged ones are among them: opening one says so."""
    if not root.is_dir():
        return []
    found = [(step_of(path), path) for path in root.iterdir() if step_of(path) is not None and path.is_dir()]
    return [path for _, path in sorted(found)]


def latest(root: Path) -> Path | None:
    """The committed checkpoint with the highest step; None when there is none."""
    checkpoints = list_checkpoints(root)
    return checkpoints[-1] if checkpoints else None


def temporary_for(root: Path, step: int, owner: str) -> Path:
    """The name under `root` for a save of `step` under way; `owner` tells it from every other attempt."""
    return root / f"{SAVING}{step_name(step)}-{owner}"


def discard(path: Path) -> None:
    """Remove a checkpoint. It stops being one at once, by a rename, however long the deletion takes.

    Raises CheckpointError.
    """
    try:
        doomed = doom(path)
        fsync_directory(path.parent)
        delete(doomed, ignore_errors=False)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be removed ({error}); check the permissions of {path.parent}") from error


def clear_stale(root: Path) -> None:
    """Remove what dead saves and removals left. Should such a save be alive after all, it fails: its directory is gone.

    What cannot be deleted (a network file system keeps files that somebody has open) is left for another time.
    Raises OSError.
    """
    for path in list(root.iterdir()):
        if path.name.startswith(SAVING):
            path = doom(path)
        if path.name.startswith(_REMOVING):
            delete(path)
    fsync_directory(root)


def doom(path: Path) -> Path:
    """Rename `path` to what no one takes for a checkpoint or for a save under way; the new name. Raises OSError."""
    doomed = path.with_name(f"{_REMOVING}{path.name.removeprefix(SAVING)}-{secrets.token_hex(4)}")
    os.rename(path, doomed)
    return doomed


def delete(path: Path, ignore_errors: bool = True) -> None:
    """Delete what `doom` has renamed: a directory, a file or a link. Raises OSError unless told to ignore it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors)
    else:
        path.unlink(missing_ok=ignore_errors)
