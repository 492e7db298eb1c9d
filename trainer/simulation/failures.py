"""Forecasts what failures cost a recipe on a described cluster, given the time of a step."""

from dataclasses import dataclass, field, replace

from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Cluster
from bagualu.fault_tolerance.forecast.assumptions import Assumptions
from bagualu.fault_tolerance.forecast.forecast import Estimate, Settings, Workload, forecast, run_model
from bagualu.fault_tolerance.forecast.interval import best_interval
from bagualu.fault_tolerance.forecast.report import FailureReport, enough_restarts, report_on
from bagualu.fault_tolerance.forecast.run_model import RunModel
from bagualu.parallel.layout import Layout
from bagualu.trainer.costs.state import checkpoint_bytes
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.recipe.config import Recipe

_RUNS = 200


@dataclass(frozen=True)
class FailureQuestion:
    """What is to be forecast."""

    days: float = 14.0
    spares: int | None = None
    """Nodes that stand by; None: always enough."""
    assumptions: Assumptions = field(default_factory=Assumptions)
    own_interval: bool = False
    """Whether the user gave checkpoint.every, which then stays."""
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


@dataclass(frozen=True)
class RunLength:
    """What fits into a time with failures."""

    days: float
    steps: int
    """Those that 95% of the simulated runs reach."""
    checkpoint_steps: int
    """The user's interval between checkpoints or, if there is none, the longest that costs at most 0.1% of the time more than the
    best."""
    restart_limit: int
    """How often the launch may restart: the recipe's restart.limit or, if that is too low, one that suffices."""
    effective: Estimate
    """Effective training time."""


def run_length(recipe: Recipe, cluster: Cluster, layout: Layout, step_seconds: float, question: FailureQuestion) -> RunLength:
    """Returns how many steps of `recipe` fit into `question.days`, if they take `step_seconds` each on `cluster`, which has exactly
    the devices of `layout`. Raises RecipeError as `run_model` does, or if the time is shorter than a step."""
    work, seconds = workload(recipe, layout, step_seconds), question.days * 86400
    model = run_model(cluster, work, settings_of(recipe), question.assumptions, question.spares)
    if not question.own_interval and (best := best_interval(model, seconds, _RUNS, seed=0)):
        model = replace(model, checkpoint_steps=best.longest)
    time = forecast(model, seconds, _RUNS)
    steps = int(time.progress.low * seconds / step_seconds)
    if steps < 1:
        raise RecipeError(f"days={question.days:g} is shorter than a step of {step_seconds:.3g} s; give more days or a smaller "
                          "data.global_batch")  # fmt: skip
    limit = recipe.restart.limit
    return RunLength(
        days=question.days,
        steps=steps,
        checkpoint_steps=min(steps, model.checkpoint_steps),
        restart_limit=enough_restarts(time.failures) if limit < time.failures.high else limit,
        effective=time.ratio,
    )


def require_forecast(recipe: Recipe, cluster: Cluster, question: FailureQuestion) -> None:
    """Raises RecipeError if `cluster` has not the figures for a forecast, or a figure is impossible."""
    run_model(cluster, Workload(cluster.devices or 1, 1.0, 1.0), settings_of(recipe), question.assumptions, question.spares)


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
