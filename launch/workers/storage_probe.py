"""The launcher's looks at a run's storage. They end, even where the storage does not answer. Free of torch."""

from pathlib import Path

from bagualu.comm.errors import RecipeError, StorageError
from bagualu.fault_tolerance import run_lock
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH
from bagualu.fault_tolerance.within import within
from bagualu.trainer.begun import BEGUN, has_begun
from bagualu.trainer.recipe import choose_backend as chooser
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.choose_backend import Choice
from bagualu.trainer.recipe.config import Recipe

_CHECK_SECONDS = 30.0
_LOOK_SECONDS = 5.0
_UNKNOWN = "its newest checkpoint, when its storage answers"


def check(recipe: Recipe, job: str = "") -> None:
    """Whether the run directory is free, fits the recipe and can be written. Raises RecipeError."""
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


def choose_backend(recipe: Recipe, workers: int) -> tuple[Recipe, Choice]:
    """The recipe with a backend that has a name (trainer/recipe/choose_backend.py), which may be that of the run so far."""
    try:
        return within(_CHECK_SECONDS, lambda: chooser.choose_backend(recipe, workers))
    except StorageError as error:
        raise RecipeError(f"run.dir={recipe.run.dir} {error}; see whether its storage hangs, or give another") from error


def begun(scratch: Path) -> bool:
    """Whether a start of the launch has had the run's checkpoints, wherever they are now."""
    return (scratch / BEGUN).exists()


def newest(recipe: Recipe, begun: bool = False) -> str | None:
    """The checkpoint that the run would go on from, for people; None when there is none. `begun`: of this launch."""
    directory = Path(recipe.run.dir)

    def look() -> str | None:
        if found := latest(directory / "checkpoints"):
            return found.name
        known = begun or has_begun(directory)
        return _UNKNOWN if known and not (directory / "checkpoints" / EPOCH).exists() else None

    try:
        return within(_LOOK_SECONDS, look)
    except (OSError, StorageError):
        return _UNKNOWN
