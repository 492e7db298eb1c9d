"""Settles what a recipe leaves open for this machine, before everything that depends on it: the checks of the recipe, config.yaml,
the workers."""

from bagualu.trainer.costs.fits import device_of
from bagualu.trainer.costs.micro_batch import choose_micro_batch, size_as_begun
from bagualu.trainer.recipe.choose_backend import Choice, choose_backend
from bagualu.trainer.recipe.config import Recipe


def settle(recipe: Recipe, workers: int, world: int) -> tuple[Recipe, str]:
    """Returns the recipe, for `world` ranks of which `workers` are on this machine, with comm.backend=auto and
    train.micro_batch=auto replaced by what is chosen, and the choices as text for the first line of a run. Raises RecipeError if
    the recipe is wrong, as far as the choices depend on it."""
    recipe, backend = choose_backend(recipe, workers)
    return take_size(recipe, backend, workers, world, size_as_begun(recipe))


def take_size(recipe: Recipe, backend: Choice, workers: int, world: int, before: int | None) -> tuple[Recipe, str]:
    """Returns what `settle` does once the backend is chosen; `before` is the size of micro-batches with which the run began. It
    reads no files of the run."""
    settled = choose_micro_batch(recipe, world, device_of(recipe, workers), before)
    chosen = f" and train.micro_batch={settled.train.micro_batch} (auto)" if settled != recipe else ""
    return settled, f"{backend}{chosen}"
