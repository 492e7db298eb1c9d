"""What a plan may choose for a recipe. Imports no torch, so that a wrong command is refused quickly."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Cluster
from bagualu.parallel.config import ENGINES
from bagualu.parallel.planner.layouts import KEYS, SearchSpace, degrees, layouts
from bagualu.trainer.recipe.changed import changed, value_of
from bagualu.trainer.recipe.config import CHOSEN, Recipe
from bagualu.trainer.simulation.setting import on_cluster

_NO_CHOICE = {"parallel.data": None, "parallel.virtual_stages": None, "parallel.zero": None, "parallel.shares": None}
"""Values that leave the choice open."""
_PLAIN = dict.fromkeys(_NO_CHOICE) | {
    "parallel.tensor": 1, "parallel.pipeline": 1, "parallel.expert": 1, "parallel.sequence": False, "parallel.schedule": "1f1b",
    "parallel.balance": "uniform", "parallel.speeds": None, "train.micro_batch": 1,
}  # fmt: skip
_NEAR = 64
"""How far from the given world another is looked for that divides."""


def search_space(recipe: Recipe, cluster: Cluster, world: int, given: Iterable[str]) -> SearchSpace:
    """Returns the layouts from which a plan chooses, with the values of the keys `given` by the user kept.

    Raises RecipeError if there is none, with a number of devices near `world` for which there is one.
    """
    space = _space(recipe, cluster, world, given)
    if _some(space):
        return space
    fixed = {key: value_of(recipe, key) for key in space.fixed}
    if fixed:
        changed(recipe, _PLAIN | fixed).validate(world)  # says which of these keys is at fault, if one is alone
    keys = f" with {' '.join(f'{key}={value}' for key, value in fixed.items())}" if fixed else ""
    near = [other for distance in range(1, _NEAR) for other in (world - distance, world + distance) if other > 0]
    works = next((other for other in near if _some(_space(recipe, cluster, other, given))), None)
    fix = f"give world={works}" if works else "give another world, or fewer keys"
    raise RecipeError(f"world={world}: no layout{keys} divides the model and data.global_batch={recipe.data.global_batch}; {fix}")


def plannable(recipe: Recipe, cluster: Cluster, given: Sequence[str]) -> Recipe:
    """Returns the recipe on which a plan works: with the backend of the cluster, and without what belongs to a layout that it
    replaces."""
    parallel = recipe.parallel
    if "parallel.balance" not in given and "parallel.speeds" not in given:
        parallel = replace(parallel, balance="uniform", speeds=None)
    train = replace(recipe.train, micro_batch=1) if recipe.train.micro_batch == CHOSEN else recipe.train  # the plan chooses it
    return on_cluster(replace(recipe, parallel=parallel, train=train), cluster)


def choosable(recipe: Recipe, given: Iterable[str]) -> list[str]:
    """Returns those of parallel.balance and parallel.shares that a plan may choose."""
    return [key for key in ("parallel.balance", "parallel.shares") if key not in _fixed(recipe, given)]


def _space(recipe: Recipe, cluster: Cluster, world: int, given: Iterable[str]) -> SearchSpace:
    tiers = [part.tiers[0] for part in cluster.parts if part.tiers]
    return SearchSpace(
        world=world,
        layers=recipe.model.layers,
        widths=tuple(recipe.tensor_widths().values()),
        experts=recipe.model.moe.experts,
        global_batch=recipe.data.global_batch,
        sequence_length=recipe.data.sequence_length,
        most_tensor=min((tier.devices or world for tier in tiers), default=world),
        zero_stages=sorted(ENGINES[recipe.parallel.engine]),
        whole_backward=recipe.parallel.engine != "native",
        unequal=len(cluster.parts) > 1,
        fixed=_fixed(recipe, given),
    )


def _fixed(recipe: Recipe, given: Iterable[str]) -> Mapping[str, Any]:
    values = {key: value_of(recipe, key) for key in given if key in KEYS}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
            if value is not None or key not in _NO_CHOICE}  # fmt: skip


def _some(space: SearchSpace) -> bool:
    return any(True for of in degrees(space) for _ in layouts(space, of))
