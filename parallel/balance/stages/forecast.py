"""A split of layers into stages, and its cost as predicted from the cost table."""

import json
from dataclasses import asdict, dataclass, field

from bagualu.parallel.balance.stages.problem import Piece, Problem, StageTimes
from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.parallel.pipeline.schedules.schedule import Action, Kind
from bagualu.parallel.pipeline.timeline import simulate


@dataclass(frozen=True)
class Forecast:
    """The predicted cost of a split, in seconds per micro-batch unless stated otherwise."""

    times: list[StageTimes]
    """The times of each stage, at the speed of its rank."""
    speeds: list[float]
    """The speed of each pipeline rank, relative to the device of the cost table."""
    memory_bytes: list[int]
    """The peak memory of each pipeline rank, in bytes."""
    bottleneck_seconds: float
    """The computing time of the slowest rank per micro-batch, over all its stages."""
    step_seconds: float
    """The time from the first to the last pass of a whole step on the schedule, including waiting."""
    source: str
    """The origin of the costs, for messages, as in `CostTable.source`."""
    least_seconds: float = 0.0
    """A proven lower bound for the bottleneck of any split; 0.0 if no search has proven a bound."""
    spare_bytes: list[int] = field(default_factory=list)
    """How many bytes of gathered weights each pipeline rank may keep through a step within its memory cap; empty: none."""


@dataclass(frozen=True)
class Split:
    """The layers of each stage, and what the backward pass computes again."""

    slices: list[LayerSlice]
    recompute: list[str]
    """For each layer of the model, the part that its backward pass computes again: none, attention, experts or full."""
    forecast: Forecast | None = field(default=None, compare=False)
    """The predicted cost; None if no costs were computed."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Split":
        raw = json.loads(text)
        forecast = raw["forecast"]
        if forecast is not None:
            forecast = Forecast(**{**forecast, "times": [StageTimes(**times) for times in forecast["times"]]})
        return Split([LayerSlice(**one) for one in raw["slices"]], raw["recompute"], forecast)

    @property
    def counts(self) -> list[int | float]:
        """The number of layers of each stage."""
        return [one.count for one in self.slices]


def by_rank(problem: Problem, pieces: list[Piece]) -> list[tuple[Piece, ...]]:
    """Returns the pieces of each rank's stages; `pieces` is by stage."""
    return [tuple(pieces[stage] for stage in stages) for stages in problem.stages_of]


def forecast_split(problem: Problem, pieces: list[Piece]) -> Split:
    """Returns the split into `pieces`, by stage, with its forecast. Raises ValueError if a rank's pieces exceed its memory cap."""
    chosen: frozenset[int] = frozenset()
    seconds, memory = [], []
    for rank, mine in enumerate(by_rank(problem, pieces)):
        cost = problem.cost(rank, mine)
        if cost is None:
            raise ValueError(f"the stages {mine} do not fit rank {rank}")
        seconds.append(cost.seconds)
        memory.append(problem.memory(rank, mine, cost.chosen))
        chosen |= cost.chosen
    times = [problem.stage_times(stage, piece, chosen) for stage, piece in enumerate(pieces)]
    step = step_seconds(problem, times)
    forecast = Forecast(times, problem.speeds, memory, max(seconds), step, problem.table.source)
    return Split([problem.slice_of(piece) for piece in pieces], problem.recompute(chosen), forecast)


def step_seconds(problem: Problem, times: list[StageTimes]) -> float:
    """Returns the seconds from the start of a step until its last pass ends; `times` is by stage. Messages take no time here, since
    every split sends equally many."""
    table = {}
    for stage, stage_times in enumerate(times):
        table[Kind.FORWARD, stage] = stage_times.forward
        table[Kind.BACKWARD, stage] = stage_times.input_gradient + stage_times.weight_gradient
        table[Kind.INPUT_GRADIENT, stage] = stage_times.input_gradient
        table[Kind.WEIGHT_GRADIENT, stage] = stage_times.weight_gradient

    def cost(action: Action) -> float:
        return table[action.kind, action.stage]

    return float(simulate(problem.schedule, cost).end)
