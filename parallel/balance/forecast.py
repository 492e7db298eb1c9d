"""A split, and what the cost table says it will take. Free of torch."""

import json
from dataclasses import asdict, dataclass, field

from bagualu.parallel.balance.problem import Piece, Problem, StageTimes
from bagualu.parallel.pipeline.schedule import Action, Kind
from bagualu.parallel.pipeline.timeline import simulate


@dataclass(frozen=True)
class Forecast:
    """What a split takes: seconds for one micro-batch unless said otherwise."""

    times: list[StageTimes]
    """By stage, at the speed of its rank."""
    speeds: list[float]
    """By rank of the pipeline."""
    memory_bytes: list[int]
    """By rank, at its worst moment."""
    bottleneck_seconds: float
    """Of the slowest rank, all its stages together."""
    step_seconds: float
    """Forward and backward passes of a whole step on the schedule, its waiting included."""
    source: str
    """Where the costs come from."""
    least_seconds: float = 0.0
    """No split has a lower bottleneck than this, as far as is proven."""


@dataclass(frozen=True)
class Split:
    """Which layers each stage holds, and whether it computes activations again in its backward pass."""

    slices: list[range]
    recompute: list[bool]
    forecast: Forecast | None = field(default=None, compare=False)
    """None where nobody asked for costs."""

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "slices": [[piece.start, piece.stop] for piece in self.slices]})

    @staticmethod
    def from_json(text: str) -> "Split":
        raw = json.loads(text)
        forecast = raw["forecast"]
        if forecast is not None:
            forecast = Forecast(**{**forecast, "times": [StageTimes(**times) for times in forecast["times"]]})
        return Split([range(*piece) for piece in raw["slices"]], raw["recompute"], forecast)


def by_rank(problem: Problem, pieces: list[Piece]) -> list[tuple[Piece, ...]]:
    return [tuple(pieces[stage] for stage in stages) for stages in problem.stages_of]


def forecast_split(problem: Problem, pieces: list[Piece]) -> Split:
    """The split into `pieces`, by stage, which fit the caps. Raises ValueError where they do not."""
    recompute = [False] * len(pieces)
    seconds, memory = [], []
    for rank, mine in enumerate(by_rank(problem, pieces)):
        cost = problem.cost(rank, mine)
        if cost is None:
            raise ValueError(f"the stages {mine} do not fit rank {rank}")
        seconds.append(cost.seconds)
        memory.append(problem.memory(rank, mine, cost.recompute))
        for stage, again in zip(problem.stages_of[rank], cost.recompute, strict=True):
            recompute[stage] = again
    times = [problem.stage_times(stage, piece, recompute[stage]) for stage, piece in enumerate(pieces)]
    step = step_seconds(problem, times)
    forecast = Forecast(times, problem.speeds, memory, max(seconds), step, problem.table.source)
    return Split([range(*piece) for piece in pieces], recompute, forecast)


def step_seconds(problem: Problem, times: list[StageTimes]) -> float:
    """When the last pass of the schedule ends; messages take no time, as there are as many of them whatever the split."""
    table = {}
    for stage, one in enumerate(times):
        table[Kind.FORWARD, stage] = one.forward
        table[Kind.BACKWARD, stage] = one.input_gradient + one.weight_gradient
        table[Kind.INPUT_GRADIENT, stage] = one.input_gradient
        table[Kind.WEIGHT_GRADIENT, stage] = one.weight_gradient

    def cost(action: Action) -> float:
        return table[action.kind, action.stage]

    return float(simulate(problem.schedule, cost).end)
