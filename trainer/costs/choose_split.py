"""Chooses the split of a recipe's layers, the same on every rank.

Measured costs and speeds differ between ranks and between measurements. So rank 0 takes its own costs and the gathered speeds of
all ranks, and broadcasts the result: a split, or the error that refuses the recipe.
"""

import math
import statistics
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.agree import gather, meet
from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.comm.objects import broadcast_json
from bagualu.parallel.balance.replicas import shares
from bagualu.parallel.balance.stages.cost import CostTable
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.schedules.schedule import Schedule
from bagualu.trainer.costs.analytic import analytic_table
from bagualu.trainer.costs.cache import device_name, figures
from bagualu.trainer.costs.measured import measured_table
from bagualu.trainer.costs.plan_split import measures, needs_costs, plan_split, split_by
from bagualu.trainer.costs.throughput import matmul_ceiling
from bagualu.trainer.costs.work import ModelWork, work_of
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.user_settings import default_cache

ALIKE = 0.05
"""A device whose measured speed differs from the median by less than this fraction counts as having the median speed."""
_PROBE_SECONDS = 0.2


def agree_on_split(
    recipe: Recipe, layout: Layout, schedule: Schedule, communicator: Communicator
) -> tuple[Split, CostTable | None]:
    """Returns the split that `parallel.balance` asks for, and the costs that were used for it (None if none were). Collective.

    Raises RecipeError on every rank if no split fits the limits of memory (parallel.memory_bytes or train.recompute=bytes:N).
    """
    if not needs_costs(recipe):
        return plan_split(recipe, layout, schedule)
    speeds = _speeds(recipe, layout, communicator)
    answer: dict[str, Any] = {}
    if communicator.rank == 0:
        table = _table(recipe, work_of(recipe, layout), communicator.device)
        try:
            split, table = split_by(recipe, layout, table, schedule, speeds)
            answer["split"], answer["table"] = split.to_json(), table.to_json()
        except RecipeError as error:
            answer["refusal"] = str(error)
    answer = broadcast_json(answer, communicator.world)
    if "refusal" in answer:
        raise RecipeError(answer["refusal"])
    return Split.from_json(answer["split"]), CostTable.from_json(answer["table"])


def _table(recipe: Recipe, work: ModelWork, device: torch.device) -> CostTable:
    if not measures(recipe):
        return analytic_table(work)
    cache = Path(recipe.data.cache) if recipe.data.cache else default_cache()
    found = figures(cache, work, device)
    return measured_table(work, found, f"measured on {device_name(device)}")


def agree_on_shares(recipe: Recipe, layout: Layout, communicator: Communicator) -> list[int]:
    """Returns the number of micro-batches per step of each data rank, the same on all ranks. Collective if the shares are
    measured."""
    declared = recipe.declared_shares(layout)
    if declared is not None:
        return declared
    rates = _rates(recipe, communicator)
    return shares(recipe.micro_batches(), replica_speeds(rates, layout))


def replica_speeds(rates: list[float], layout: Layout) -> list[float]:
    """Returns the speed of each data rank, given the FLOP/s of all ranks: the rate of the replica's slowest rank divided by the
    median of these rates. A speed within `ALIKE` of the median is 1."""
    slowest = _slowest(rates, layout, "data")
    middle = statistics.median_low(slowest)
    return [1.0 if abs(rate / middle - 1) < ALIKE else rate / middle for rate in slowest]


def _speeds(recipe: Recipe, layout: Layout, communicator: Communicator) -> list[float]:
    """Returns the speed of each pipeline rank relative to rank 0's, or as parallel.speeds declares; 1.0 for all if it is left out.
    Collective if the speeds are measured."""
    declared = recipe.parallel.speeds
    if declared is None:
        return [1.0] * layout.pipeline
    if declared != "measured":
        return [float(speed) for speed in declared]
    return relative_speeds(_rates(recipe, communicator), layout)


def _rates(recipe: Recipe, communicator: Communicator) -> list[float]:
    """Returns the FLOP/s of every rank, measured on all at the same time, since they share memory and power in the run too.
    Collective."""
    meet(communicator.world)
    dtype, device = getattr(torch, recipe.train.stored_dtype), communicator.device
    return gather(matmul_ceiling(dtype, device, torch.get_num_threads(), _PROBE_SECONDS), communicator.world)


def relative_speeds(rates: list[float], layout: Layout) -> list[float]:
    """Returns the speed of each pipeline rank, given the FLOP/s of all ranks: the rate of the slowest rank that holds the same
    stages, relative to that of rank 0, which measures the costs. A rate within `ALIKE` of the median counts as equal to it."""
    slowest = _slowest(rates, layout, "pipeline")
    middle = statistics.median_low([*slowest, rates[0]])
    alike = [middle if abs(rate / middle - 1) < ALIKE else rate for rate in [rates[0], *slowest]]
    return [rate / alike[0] for rate in alike[1:]]


def _slowest(rates: list[float], layout: Layout, axis: str) -> list[float]:
    """Returns, by coordinate on `axis`, the lowest of the `rates` (FLOP/s) of the ranks with that coordinate."""
    slowest = [math.inf] * layout.size(axis)
    for rank, rate in enumerate(rates):
        at = layout.coordinates(rank)[axis]
        slowest[at] = min(slowest[at], rate)
    return slowest
