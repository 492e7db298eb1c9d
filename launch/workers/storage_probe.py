"""Reads a run's storage for the launcher, always with a timeout, so that storage that does not answer cannot block it."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bagualu.comm.errors import RecipeError, StorageError
from bagualu.fault_tolerance import run_lock
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH
from bagualu.fault_tolerance.run_directory import BEGUN, RunDirectory
from bagualu.fault_tolerance.within import within
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.settle import settle as settle_reading

T = TypeVar("T")
_CHECK_SECONDS = 30.0
_LOOK_SECONDS = 5.0
_UNKNOWN = "its newest checkpoint, when its storage answers"


def check(recipe: Recipe, job: str = "") -> None:
    """Raises RecipeError if a job other than `job` uses the run directory, or if the directory does not fit the recipe
    (`check_run_directory`), cannot be read or written, or does not answer in time."""
    directory = Path(recipe.run.dir)

    def look() -> None:
        run_lock.refuse_if_held(directory, job)
        preflight.check_run_directory(recipe)

    try:
        within(_CHECK_SECONDS, look)
    except StorageError as error:
        raise RecipeError(f"run.dir={directory} {error}; see whether its storage hangs, or give another") from error
    except OSError as error:
        what = f"{error.strerror}: {error.filename or directory}"
        raise RecipeError(f"run.dir={directory} cannot be read ({what}); see whether its storage answers") from error


def settle(recipe: Recipe, workers: int, predicts: bool = True) -> tuple[Recipe, str]:
    """Returns the recipe with comm.backend=auto, train.micro_batch=auto and train.compile=auto replaced by what is chosen for
    `workers` workers on this machine, and the choices as text for the first line of a run (trainer/settle.py). `predicts`: as for
    that function.

    Reads the run directory, because a resumed run keeps what it began with. Raises RecipeError when the storage does not answer,
    and for some mistakes in the recipe.
    """

    def read(look: Callable[[], T]) -> T:
        try:
            return within(_CHECK_SECONDS, look)
        except StorageError as error:
            raise RecipeError(f"run.dir={recipe.run.dir} {error}; see whether its storage hangs, or give another") from error

    return settle_reading(recipe, workers, recipe.world_size(), read, predicts)


def begun(scratch: Path) -> bool:
    """Returns whether workers of this launch have opened the run's checkpoints, even if the checkpoints cannot be seen now."""
    return (scratch / BEGUN).exists()


def newest(recipe: Recipe, begun: bool = False) -> str | None:
    """Returns, for messages, the name of the checkpoint that the run would resume from; None if there is none. If the storage does
    not answer or its checkpoints should be there but are not, returns a text that says so.

    `begun` says whether this launch has opened the run's checkpoints.
    """
    run = RunDirectory(recipe.run.dir)

    def look() -> str | None:
        if checkpoint := latest(run.checkpoints):
            return checkpoint.name
        known = begun or run.has_begun()
        return _UNKNOWN if known and not (run.checkpoints / EPOCH).exists() else None

    try:
        return within(_LOOK_SECONDS, look)
    except (OSError, StorageError):
        return _UNKNOWN
