"""The directory of a run's checkpoints: which names are checkpoints, and how they are removed.

A committed checkpoint is called `step-` and a number of at least eight digits. It got that name by a rename, so it is complete.
Nothing else is ever loaded. Names that begin with `.saving-` or `.removing-` belong to saves and removals that are in progress or
were interrupted when their process died.
"""

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.layout.durable import fsync_directory
from bagualu.fault_tolerance.checkpoint.layout.format import MANIFEST, CheckpointError, step_name, step_of
from bagualu.fault_tolerance.run_directory import RunDirectory

SAVING, _REMOVING = ".saving-", ".removing-"


def list_checkpoints(root: Path) -> list[Path]:
    """Returns the committed checkpoints under `root`, lowest step first, including damaged ones, which raise an error only when
    they are read."""
    if not root.is_dir():
        return []
    checkpoints = [(step_of(path), path) for path in root.iterdir() if step_of(path) is not None and path.is_dir()]
    return [path for _, path in sorted(checkpoints)]


def latest(root: Path) -> Path | None:
    """Returns the committed checkpoint with the highest step; None if there is none."""
    checkpoints = list_checkpoints(root)
    return checkpoints[-1] if checkpoints else None


def is_checkpoint(path: Path) -> bool:
    """Returns whether `path` is named as a checkpoint, or holds the manifest of one."""
    return step_of(path) is not None or (path / MANIFEST).exists()


def checkpoint_at(path: Path) -> Path:
    """Returns `path` if it is a checkpoint, or the newest checkpoint of the run whose directory it is. Raises RecipeError if it is
    neither."""
    if path.is_dir() and is_checkpoint(path):
        return path
    newest = latest(RunDirectory(path).checkpoints)
    if newest is None:
        what = "holds no checkpoint" if path.is_dir() else "is no directory"
        raise RecipeError(f"{path} {what}; give a run that has saved a checkpoint, or a checkpoint")
    return newest


def temporary_for(root: Path, step: int, owner: str) -> Path:
    """Returns the directory under `root` for a save of `step` in progress; `owner` distinguishes it from other attempts."""
    return root / f"{SAVING}{step_name(step)}-{owner}"


def discard(path: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that it is no longer a checkpoint before the slow deletion begins.

    Raises CheckpointError.
    """
    try:
        doomed = doom(path)
        fsync_directory(path.parent)
        delete(doomed, ignore_errors=False)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be removed ({error}); check the permissions of {path.parent}") from error


def clear_stale(root: Path) -> None:
    """Removes everything under `root` that interrupted saves and removals have left. A save that is still running fails, because
    its directory is gone.

    Files that cannot be deleted (a network file system keeps files that a process has open) stay for the next call. Raises OSError.
    """
    for path in list(root.iterdir()):
        if path.name.startswith(SAVING):
            path = doom(path)
        if path.name.startswith(_REMOVING):
            delete(path)
    fsync_directory(root)


def doom(path: Path) -> Path:
    """Renames `path` to a name that is neither a checkpoint's nor that of a save in progress; returns the new path. Raises
    OSError."""
    doomed = path.with_name(f"{_REMOVING}{path.name.removeprefix(SAVING)}-{secrets.token_hex(4)}")
    os.rename(path, doomed)
    return doomed


def delete(path: Path, ignore_errors: bool = True) -> None:
    """Deletes a directory, file or link that `doom` has renamed. With `ignore_errors`, what cannot be deleted stays; otherwise
    raises OSError."""
    with contextlib.suppress(OSError) if ignore_errors else contextlib.nullcontext():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors)
        else:
            path.unlink()
