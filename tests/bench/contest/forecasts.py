"""What the cost table that a run measured says of the splits it could have had."""

from collections.abc import Sequence
from pathlib import Path

import torch

from bagualu.parallel.balance.stages.choose import choose_split
from bagualu.parallel.balance.stages.cost import CostTable
from bagualu.parallel.balance.stages.forecast import forecast_split
from bagualu.parallel.balance.stages.problem import Problem
from bagualu.parallel.pipeline.layer_slice import cut_inside
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.parallel.pipeline.schedules.schedule import Schedule
from bagualu.parallel.pipeline.split import split_layers
from bagualu.trainer.costs.cache import device_name, figures
from bagualu.trainer.costs.measured import measured_table
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.recipe.config import Recipe


class Forecasts:
    """Forecasts of the step time of one model on one schedule."""

    def __init__(self, table: CostTable, schedule: Schedule) -> None:
        self.table, self.schedule = table, schedule

    def of(self, counts: Sequence[float], speeds: list[float] | None = None) -> float:
        """Seconds of the passes of a step with `counts` layers on the stages, on ranks of these speeds."""
        placement = self.schedule.placement
        slices = split_layers(len(self.table.layers), placement, list(counts))
        problem = Problem(self.table, self.schedule, speeds or [1.0] * placement.ranks, None, halves=cut_inside(slices))
        forecast = forecast_split(problem, problem.pieces(slices)).forecast
        assert forecast is not None
        return forecast.step_seconds

    def best(self, speeds: list[float]) -> list[int | float]:
        """Layers of the stages in the best split for ranks of these speeds."""
        return choose_split(self.table, self.schedule, speeds).counts


def forecasts(recipe: Recipe, cache: Path, threads: int = 1) -> Forecasts:
    """After a run of `recipe` with parallel.balance=measured that kept its costs in `cache`. Raises RuntimeError without one."""
    torch.set_num_threads(threads)  # part of what the costs are kept under
    return Forecasts(kept_table(recipe, cache), schedule_of(recipe))


def schedule_of(recipe: Recipe) -> Schedule:
    layout, parallel = recipe.validate(recipe.world_size()), recipe.parallel
    shares = recipe.declared_shares(layout)
    assert shares is not None, "the benchmark's recipes share a step evenly"
    return compute_schedule(parallel.schedule, layout.pipeline, max(shares), parallel.virtual_stages)


def kept_table(recipe: Recipe, cache: Path) -> CostTable:
    """The costs that a run of `recipe` has measured and kept. Raises RuntimeError when none has."""
    work, device = work_of(recipe, recipe.validate(recipe.world_size())), torch.device("cpu")
    before = set((cache / "costs").glob("*.json"))
    found = figures(cache, work, device, recipe.train.compile)
    if set((cache / "costs").glob("*.json")) != before:
        raise RuntimeError(f"no run has kept the costs of this recipe in {cache}; run it with parallel.balance=measured first")
    return measured_table(work, found, f"measured on {device_name(device)}")


def uniform(recipe: Recipe) -> list[int | float]:
    """Layers of the stages by count."""
    return [one.count for one in split_layers(recipe.model.layers, schedule_of(recipe).placement)]
