"""Forecasts what failures cost a recipe on a described cluster, given the time of a step."""

from dataclasses import dataclass, field

from bagualu.comm.topology import Cluster
from bagualu.fault_tolerance.forecast.assumptions import Assumptions
from bagualu.fault_tolerance.forecast.forecast import Settings, Workload, run_model
from bagualu.fault_tolerance.forecast.report import FailureReport, report_on
from bagualu.fault_tolerance.forecast.run_model import RunModel
from bagualu.parallel.layout import Layout
from bagualu.trainer.costs.state import checkpoint_bytes
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.recipe.config import Recipe


@dataclass(frozen=True)
class FailureQuestion:
    """What is to be forecast."""

    days: float = 14.0
    spares: int | None = None
    """Nodes that stand by; None: always enough."""
    assumptions: Assumptions = field(default_factory=Assumptions)
    asked: bool = False
    """Whether the user asked for a forecast. Then a cluster whose file has not the figures for it is refused."""


def failure_report(
    recipe: Recipe, cluster: Cluster, layout: Layout, step_seconds: float, question: FailureQuestion
) -> FailureReport | None:
    """Returns the forecast for a run of `recipe` whose steps take `step_seconds` on `cluster`, which has exactly the devices of
    `layout`. The same question has the same answer.

    Returns None if nobody asked and the cluster's file has no failure rates or no storage. Raises RecipeError if it has none but
    somebody asked, or if a figure is impossible.
    """
    known = cluster.storage is not None and all(part.failures_per_device_hour for part in cluster.parts)
    if not known and not question.asked:
        return None
    work, settings = workload(recipe, layout, step_seconds), settings_of(recipe)

    def modelled(assumptions: Assumptions) -> RunModel:
        return run_model(cluster, work, settings, assumptions, question.spares)

    return report_on(modelled, question.assumptions, question.days * 86400, recipe.restart.limit)


def workload(recipe: Recipe, layout: Layout, step_seconds: float) -> Workload:
    """Returns what a forecast needs to know of a run of `recipe` in `layout`."""
    copies = layout.fold // (layout.shard or layout.fold) if recipe.parallel.zero_stage else layout.fold
    return Workload(
        world=layout.world,
        step_seconds=step_seconds,
        state_bytes=checkpoint_bytes(work_of(recipe, layout)),
        replicas=layout.data,
        micro_batches=recipe.micro_batches() // layout.data,
        equal_shares=recipe.parallel.shares is None,
        writers=layout.world // copies,
    )


def settings_of(recipe: Recipe) -> Settings:
    """Returns the settings on which the cost of a failure depends."""
    return Settings(recipe.checkpoint, recipe.restart, recipe.guard, recipe.comm.timeout_seconds)
