"""Reads what is to be predicted from the words of a command line, without torch."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bagualu.comm.cluster_file import cluster_names, load_cluster
from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Cluster
from bagualu.launch.verbs.command_line import SEVERAL, SIMULATE_KEYS, CommandLine
from bagualu.launch.verbs.failure_words import split_failure_words
from bagualu.launch.verbs.own_words import split_words
from bagualu.trainer.costs.fits import Device, check_memory
from bagualu.trainer.costs.micro_batch import choose_micro_batch
from bagualu.trainer.data.corpus_cache import cache_folder
from bagualu.trainer.recipe.changed import changed
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.failures import FailureQuestion
from bagualu.trainer.simulation.setting import on_cluster

_PICTURES = (".png", ".svg", ".html")


@dataclass(frozen=True)
class Question:
    """What is to be predicted."""

    recipe: Recipe
    cluster: Cluster
    world: int
    loads: str
    """How tokens spread over experts, as `loads.read_shares` takes it."""
    out: Path | None
    trace: Path | None
    failures: FailureQuestion
    stragglers: float
    """The standard deviation of the ranks' times, as a fraction of the mean."""


def read_question(request: CommandLine) -> Question:
    """Returns what the words of the command line ask. Raises RecipeError."""
    failures, words = split_failure_words(request.overrides)
    own, overrides = split_words(words, SIMULATE_KEYS.__contains__)
    require_devices("simulate", own)
    world, out, trace = whole("world", own["world"]), _path(own, "out", _PICTURES), _path(own, "trace", (".json",))
    recipe = with_data_left_over(compose(overrides, SEVERAL["simulate"]), overrides, world)
    if loads := own.get("loads"):
        check_loads(loads, recipe.model.moe.experts)
    cluster = read_cluster_of(own, recipe).for_world(world)
    recipe = _with_micro_batch(on_cluster(recipe, cluster), cluster, world)
    check_memory(recipe, world, None)  # without a device: only whether a split fits parallel.memory_bytes
    return Question(recipe, cluster, world, own.get("loads", "balanced"), out, trace, failures, _fraction(own, "stragglers"))


def _with_micro_batch(recipe: Recipe, cluster: Cluster, world: int) -> Recipe:
    """Returns the recipe with train.micro_batch=auto replaced by what a run on these devices would take."""
    free = min(part.chip.memory_bytes - part.chip.context_bytes for part in cluster.parts)
    sized = choose_micro_batch(recipe, world, Device(free, f"a device of {cluster.name}"))
    return changed(recipe, {"train.micro_batch": sized.train.micro_batch})


def require_devices(verb: str, own: Mapping[str, str]) -> None:
    """Raises RecipeError if the words leave out the cluster or the number of devices."""
    for key, example in (("cluster", f"cluster=NAME (one of {', '.join(cluster_names())}, or a .yaml file)"),
                         ("world", "world=N, the number of devices")):  # fmt: skip
        if not own.get(key):
            raise RecipeError(f"{verb} needs {example}; e.g. bagualu {verb} recipe=llama3_8b cluster=h100 world=512")


def read_cluster_of(own: Mapping[str, str], recipe: Recipe) -> Cluster:
    """Returns the cluster that the words name. Raises RecipeError."""
    return load_cluster(os.path.expanduser(own["cluster"]), [cache_folder(recipe.data)])  # cluster=this lies there


def with_data_left_over(recipe: Recipe, overrides: Sequence[str], world: int) -> Recipe:
    """Returns the recipe for `world` ranks: if it names a number of data ranks for another world, they are instead those that the
    other degrees leave, unless the user gave that number."""
    given = any(word.partition("=")[0] == "parallel.data" for word in overrides)
    parallel = recipe.parallel
    ranks = (parallel.data or 1) * parallel.tensor * parallel.pipeline * parallel.context
    if parallel.data is None or given or ranks == world:
        return recipe
    return replace(recipe, parallel=replace(parallel, data=None))


def whole(key: str, value: str) -> int:
    """Returns the whole number `value` of at least 1. Raises RecipeError if it is none."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        several = "; one value at a time" if "," in value else ""
        raise RecipeError(f"{key}={value} must be a whole number of at least 1, e.g. {key}=512{several}")
    return number


def check_loads(loads: str, experts: int) -> None:
    """Raises RecipeError for loads of a dense model, and for `loads` that `read_shares` cannot know."""
    if not experts:
        raise RecipeError(f"loads={loads} has no effect on a model without experts; leave it out")
    if loads != "balanced" and not loads.startswith("skewed:") and not Path(loads).is_dir():
        raise RecipeError(f"loads={loads} is neither balanced nor skewed:R nor the directory of a run; give e.g. loads=skewed:1.5")


def _fraction(own: Mapping[str, str], key: str) -> float:
    """Returns the fraction below 1 that `key` names; 0 if it is not given. Raises RecipeError if it is none."""
    text = own.get(key, "0")
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not 0 <= fraction < 1:
        raise RecipeError(f"{key}={text} must be a fraction of at least 0 and below 1, e.g. {key}=0.02 for 2%")
    return fraction


def _path(own: dict[str, str], key: str, endings: Sequence[str]) -> Path | None:
    """Returns the path that `key` names; None if it is not given. Raises RecipeError for another ending or a folder that is not
    there."""
    if key not in own:
        return None
    path = Path(os.path.expanduser(own[key]))
    if path.suffix not in endings:
        named = " or ".join(filter(None, (", ".join(endings[:-1]), endings[-1])))
        example = path.with_suffix(endings[0]) if path.name else f"step{endings[0]}"
        raise RecipeError(f"{key}={own[key]} must end in {named}; give {key}={example}")
    if not path.parent.is_dir():
        raise RecipeError(f"{path.parent} does not exist; make it, or give {key}={path.name}")
    return path
