"""Finds the layouts with which a recipe trains fastest on a described cluster."""

from collections.abc import Callable, Iterable, Sequence

from bagualu.comm.cluster_file import cluster_names, load_cluster
from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Cluster
from bagualu.parallel.planner.layouts import KEYS, PlannedLayout
from bagualu.parallel.planner.search import Effort, Need, Plan, leanest_need, search
from bagualu.parallel.simulation.operator_cost import operator_seconds
from bagualu.trainer.costs.prediction import size_text
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.estimate import StepEstimator
from bagualu.trainer.simulation.layout_costs import LayoutCosts
from bagualu.trainer.simulation.loads import Shares
from bagualu.trainer.simulation.passes import LayerTraces
from bagualu.trainer.simulation.predict import Prediction, predict
from bagualu.trainer.simulation.results import Results
from bagualu.trainer.simulation.search_space import choosable, plannable, search_space
from bagualu.trainer.simulation.setting import chip_type
from bagualu.trainer.simulation.trace import Traced, traceable

_MOST_DOUBLINGS = 8


def find_layouts(
    recipe: Recipe,
    cluster: Cluster,
    world: int,
    given: Iterable[str],
    effort: Effort,
    now: Callable[[], float],
    shares: Shares | None = None,
) -> Plan[Prediction]:
    """Returns the best layouts for `world` devices of `cluster`, with the values of the keys `given` by the user kept.

    `shares`: as for `predict`. Raises RecipeError if the recipe cannot be traced, or no layout fits: by how much, and what would.
    """
    given, sized = list(given), cluster.for_world(world)
    recipe = plannable(recipe, sized, given)
    traceable(recipe)  # or raises
    space = search_space(recipe, sized, world, given)
    costs = _costs(recipe, sized, world, given, shares)
    least = leanest_need(space, costs)
    if least is None:
        raise RecipeError(costs.refusal)
    if least[1].excess_bytes > 0:
        raise RecipeError(_too_large(recipe, cluster, world, given, *least))
    plan = search(space, costs, effort, now, [least[0]])
    if not plan.ranked:
        raise RecipeError("no layout was found that fits as predicted, only some that nearly do; give the search more time, or "
                          f"parallel keys near {_named(least[0])}")  # fmt: skip
    return plan


def _costs(recipe: Recipe, cluster: Cluster, world: int, given: Sequence[str], shares: Shares | None) -> LayoutCosts:
    results = Results()
    traces = LayerTraces(recipe, Traced(chip=chip_type(cluster), shares=shares, results=results))
    estimator = StepEstimator(recipe, cluster, world, traces, operator_seconds)
    return LayoutCosts(
        recipe, estimator, lambda other: predict(other, cluster, world, shares, results=results), choosable(recipe, given)
    )


def _too_large(recipe: Recipe, cluster: Cluster, world: int, given: Sequence[str], layout: PlannedLayout, need: Need) -> str:
    """Returns the message for a model that fits in no layout: by how much, and what would make it fit."""
    fixes = []
    own = sorted(key for key in given if key in KEYS)
    if own and _fits(recipe, cluster, world, []):
        fixes.append(f"leave out {' '.join(own)}")
    more = (world * 2**power for power in range(1, _MOST_DOUBLINGS + 1))
    if works := next((other for other in more if _fits(recipe, cluster, other, given)), None):
        fixes.append(f"world={works}")
    needed = need.bytes
    larger = [(load_cluster(name), name) for name in cluster_names()]
    enough = [(one.parts[0].chip.memory_bytes, name) for one, name in larger
              if len(one.parts) == 1 and one.parts[0].chip.memory_bytes - one.parts[0].chip.context_bytes >= needed]  # fmt: skip
    if enough:
        fixes.append(f"cluster={min(enough)[1]}, whose devices have {size_text(min(enough)[0])}")
    return (f"no layout on world={world} fits: the one that takes least ({_named(layout)}) needs {size_text(need.bytes)} on its "
            f"fullest rank, {size_text(need.excess_bytes)} more than its device of {cluster.name} has; "
            f"give {' or '.join(fixes) or 'a smaller model or a shorter data.sequence_length'}")  # fmt: skip


def _fits(recipe: Recipe, cluster: Cluster, world: int, given: Sequence[str]) -> bool:
    """Returns whether any layout fits `world` devices."""
    try:
        sized = cluster.for_world(world)
        space = search_space(recipe, sized, world, given)
    except RecipeError:
        return False
    least = leanest_need(space, _costs(recipe, sized, world, given, None))
    return least is not None and least[1].excess_bytes <= 0


def _named(layout: PlannedLayout) -> str:
    shown = {key: value for key, value in layout.values().items() if value not in (None, 1, "none", "uniform", False)}
    return " ".join(f"{key}={value}" for key, value in shown.items())
