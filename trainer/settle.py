"""Settles what a recipe leaves open for this machine, before everything that depends on it: the checks of the recipe, config.yaml,
the workers."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from bagualu.comm.topology import Chip
from bagualu.trainer.costs.compilation import choose_compile, compile_as_begun
from bagualu.trainer.costs.fits import device_of
from bagualu.trainer.costs.micro_batch import choose_micro_batch, size_as_begun
from bagualu.trainer.process.garbage_collection import uncollected
from bagualu.trainer.recipe.choose_backend import choose_backend
from bagualu.trainer.recipe.config import Recipe

T = TypeVar("T")


class Read(Protocol):
    """Calls a function that reads the run directory, and returns its result."""

    def __call__(self, look: Callable[[], T]) -> T: ...


def _read(look: Callable[[], T]) -> T:
    return look()


def settle(recipe: Recipe, workers: int, world: int, read: Read = _read, predicts: bool = True) -> tuple[Recipe, str]:
    """Returns the recipe, for `world` ranks of which `workers` are on this machine, with comm.backend=auto, train.micro_batch=auto
    and train.compile=auto replaced by what is chosen, and the choices as text for the first line of a run. Raises RecipeError if
    the recipe is wrong, as far as the choices depend on it, and what `read` raises.

    What kernels save is predicted only with `predicts`: that loads torch, and takes seconds. Without, train.compile=auto is false.
    """
    recipe, backend = read(lambda: choose_backend(recipe, workers))
    before = read(lambda: size_as_begun(recipe))
    settled = choose_micro_batch(recipe, world, device_of(recipe, workers), before)
    size = f"train.micro_batch={settled.train.micro_batch} (auto)" if settled != recipe else ""
    saved = _predicted if predicts else _nothing
    settled, compiles = choose_compile(settled, workers, world, saved, read(lambda: compile_as_begun(recipe)))
    return settled, " and ".join(filter(None, (str(backend), size, compiles)))


def _predicted(recipe: Recipe, chip: Chip, micro_batches: int) -> float:
    with uncollected():
        from bagualu.trainer.simulation.gain import seconds_saved

    return seconds_saved(recipe, chip, micro_batches)


def _nothing(recipe: Recipe, chip: Chip, micro_batches: int) -> float:
    return 0.0
