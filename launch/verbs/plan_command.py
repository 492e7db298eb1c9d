"""The command that runs a planned layout."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from bagualu.comm.topology import Cluster
from bagualu.trainer.recipe.changed import value_of
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.override_text import typed
from bagualu.trainer.simulation.failures import RunLength

_ALWAYS = ("parallel.data", "parallel.tensor", "parallel.pipeline", "train.micro_batch", "train.recompute", "parallel.zero")
"""Keys that the command sets even where the recipe has the same value."""


def layout_keys(recipe: Recipe, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the planned `values`, by key, that the command sets: what makes the layout, and what differs from `recipe`,
    the user's."""
    several = {"parallel.expert": recipe.model.moe.experts > 0, "parallel.schedule": values["parallel.pipeline"] > 1}
    shown = [*_ALWAYS, *(key for key, applies in several.items() if applies)]
    found = {key: value for key, value in values.items() if key in shown or value != value_of(recipe, key)}
    if recipe.parallel.speeds is not None and values["parallel.balance"] != recipe.parallel.balance:
        found["parallel.speeds"] = None
    return found


def length_keys(recipe: Recipe, length: RunLength) -> dict[str, Any]:
    """Returns the values of the keys with which a run ends in time, where they differ from the recipe's."""
    values = {"train.steps": length.steps, "checkpoint.every": length.checkpoint_steps, "restart.limit": length.restart_limit}
    return {key: value for key, value in values.items() if value != value_of(recipe, key)}


def machine_keys(recipe: Recipe, given: Sequence[str], cluster: Cluster, world: int) -> dict[str, Any]:
    """Returns the values of launch.* with which `world` ranks start on the cluster's machines, where they differ from the
    recipe's."""
    workers = recipe.launch.workers if "launch.workers" in given else None
    each = min(world, workers or cluster.node_devices)
    each = next(number for number in range(each, 0, -1) if world % number == 0)
    values: dict[str, Any] = {"launch.nodes": world // each}
    if recipe.launch.workers is not None:
        values["launch.workers"] = each
    if recipe.launch.slurm.gpus_per_node is not None:
        values["launch.slurm.gpus_per_node"] = each
    return {key: value for key, value in values.items() if value != value_of(recipe, key)}


def command(words: Sequence[str], values: Mapping[str, Any], nodes: int) -> str:
    """Returns the command that runs the user's `words` with `values` by key on so many machines."""
    kept = [word for word in words if key_of(word) not in values]
    own = [f"{key}={typed(value)}" for key, value in values.items()]
    return shlex.join(["bagualu", "slurm" if nodes > 1 else "train", *kept, *own])


def key_of(word: str) -> str:
    """Returns the key of an override."""
    return re.sub(r"^\++", "", word.partition("=")[0])
