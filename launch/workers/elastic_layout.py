"""Changes a recipe's layout to fit the workers that are left."""

from dataclasses import replace

from bagualu.comm.errors import RecipeError
from bagualu.parallel.config import RebalanceConfig
from bagualu.parallel.layout import Layout
from bagualu.parallel.shrink_layout import largest_layout
from bagualu.trainer.costs.fits import device_of, fits
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.config import Recipe

_OTHERWISE = "give a data.global_batch that fewer data ranks divide, or less to hold for each rank, e.g. parallel.zero=3"


def fitted(recipe: Recipe, ranks: int) -> tuple[Recipe, int]:
    """Returns the recipe with the valid layout of at most `ranks` ranks that is nearest to its own, and the number of ranks of that
    layout. If `ranks` suffice for its own layout, the recipe is returned unchanged.

    The global batch stays the same: fewer data ranks accumulate over more micro-batches. Raises RecipeError when no valid layout
    of at least restart.min_workers ranks fits.
    """
    full = recipe.parallel.layout(recipe.world_size())
    if ranks >= full.world:
        return recipe, full.world
    best = largest_layout(full, ranks, lambda layout: _valid(recipe, layout))
    if best is None or best.world < recipe.restart.min_workers:
        fix = f"give restart.min_workers={best.world}" if best else _OTHERWISE
        raise RecipeError(f"{ranks} workers are left of {full.world}, too few for a valid layout with at "
                          f"least restart.min_workers={recipe.restart.min_workers}; bring workers back, or {fix}")  # fmt: skip
    return with_layout(recipe, best), best.world


def with_layout(recipe: Recipe, layout: Layout) -> Recipe:
    """Returns the recipe with the degrees of `layout`, without the settings that do not apply to it.

    If the number of stages changes, lists per stage or pipeline rank no longer match: layers are then split evenly, listed speeds
    are dropped, and every rank gets the smallest memory cap. A list of shares is dropped if its length is no longer the number of
    data ranks, and parallel.shard if it no longer divides them.
    """
    given = recipe.parallel
    pipeline_stays = layout.pipeline == given.pipeline
    shares_fit = isinstance(given.shares, str) or (given.shares is not None and len(given.shares) == layout.data)
    balance_stays = pipeline_stays or (isinstance(given.balance, str) and layout.pipeline > 1)
    parallel = replace(
        given,
        balance=given.balance if balance_stays else "uniform",
        speeds=given.speeds if balance_stays and (pipeline_stays or given.speeds == "measured") else None,
        memory_bytes=given.memory_bytes if pipeline_stays or not isinstance(given.memory_bytes, list) else min(given.memory_bytes),
        shares=given.shares if shares_fit else None,
        shard=given.shard if given.shard and layout.fold % given.shard == 0 else None,
        rebalance=given.rebalance if layout.pipeline > 1 else RebalanceConfig(),
        data=layout.data,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        expert=layout.expert,
        context=layout.context,
        sequence=given.sequence and layout.tensor > 1,
    )
    return replace(recipe, parallel=parallel)


def _valid(recipe: Recipe, layout: Layout) -> bool:
    """Returns whether the recipe can run with this layout, and its ranks fit their devices and parallel.memory_bytes."""
    try:
        fewer = with_layout(recipe, layout)
        fewer.validate(layout.world)
    except RecipeError:
        return False
    workers = layout.world if recipe.launch.nodes == 1 else preflight.workers_per_node(recipe)
    return fits(fewer, layout.world, device_of(fewer, workers))
