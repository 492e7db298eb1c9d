"""Checks that all ranks have the same recipe: under torchrun, and on several nodes, each composes its own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bagualu.comm.agree import first_different
from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.override_text import typed
from bagualu.trainer.recipe.plain import plain

_SHOWN = 3
"""The most differing keys that a message names."""


def require_same_recipe(recipe: Recipe, communicator: Communicator) -> None:
    """Raises RecipeError on every rank, with up to _SHOWN keys and both values, if a rank's recipe differs from rank 0's.
    Collective.

    data.cache may differ: it does not affect the run, and each node may have its own. So may train.compile, which a node may have
    chosen by itself: rank 0 decides (trainer/costs/choose_operators.py).
    """
    own = plain(replace(recipe, data=replace(recipe.data, cache=None), train=replace(recipe.train, compile=False)))
    if difference := first_different(own, communicator.world):
        rank, theirs, first = difference
        raise RecipeError(_difference(rank, _by_key(theirs), _by_key(first)))


def _difference(rank: int, theirs: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    keys = [key for key in first if theirs.get(key) != first[key]]
    own, other = (", ".join(f"{key}={typed(values[key])}" for key in keys[:_SHOWN]) for values in (theirs, first))
    more = f" ({len(keys) - _SHOWN} more keys differ)" if len(keys) > _SHOWN else ""
    fix = f"give every rank the same {keys[0]}"
    if any(isinstance(first[key], str) for key in keys):
        fix += ", with the time or the name written out where ${now:...} or ${oc.env:...} makes it"
    return f"rank {rank} has {own} and rank 0 has {other}{more}; {fix}"


def _by_key(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dictionaries by key, e.g. {"run.dir": "runs/tiny"}."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= _by_key(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves
