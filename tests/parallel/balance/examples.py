"""Small random models and schedules to balance, and every split there is."""

import random
from collections.abc import Iterator
from itertools import combinations, pairwise

from bagualu.parallel.balance.stages.activations import Activations
from bagualu.parallel.balance.stages.cost import CostTable, LayerCost, joined
from bagualu.parallel.balance.stages.forecast import by_rank
from bagualu.parallel.balance.stages.problem import Piece, Problem
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.schedules.schedule import Action, Kind, Schedule


def all_forward_then_backward(placement: StagePlacement, micro_batches: int, split: bool = False) -> Schedule:
    """GPipe for any placement; with `split`, all input gradients before all weight gradients."""
    kinds = (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT) if split else (Kind.BACKWARD,)
    ranks = []
    for rank in range(placement.ranks):
        stages = placement.stages_of(rank)
        forward = [Action(Kind.FORWARD, m, stage) for stage in stages for m in range(micro_batches)]
        ranks.append(forward + [Action(k, m, stage) for k in kinds for stage in reversed(stages) for m in range(micro_batches)])
    return Schedule(placement, micro_batches, ranks)


def random_layer(rng: random.Random, name: str, kinds: int | None = None) -> LayerCost:
    """`kinds`: draw from so few different layers, so that many splits are equal."""
    if kinds is not None:
        rng = random.Random(rng.randrange(kinds))
    input_bytes = rng.randint(1, 4)
    attention, feed_forward = (_random_half(rng, half, input_bytes) for half in ("attention", "feed-forward"))
    return joined(name, attention, feed_forward)


def _random_half(rng: random.Random, name: str, input_bytes: int) -> LayerCost:
    forward, gradient, weight = (rng.uniform(0.05, 1.0) for _ in range(3))
    state, kept, operands = (rng.randint(1, 4) for _ in range(3))
    return LayerCost(name, forward, gradient, weight, state, input_bytes + kept, input_bytes, operands)


def random_table(rng: random.Random, layers: int, kinds: int | None = None) -> CostTable:
    embedding, head = random_layer(rng, "embedding"), random_layer(rng, "head")
    return CostTable(embedding, [random_layer(rng, f"layer {i}", kinds) for i in range(layers)], head, "drawn", rng.randint(0, 1))


def random_activations(rng: random.Random, layers: int) -> Activations:
    """Recomputation that is chosen or given by layer, with and without host memory."""
    given = tuple(rng.choice(["none", "attention", "experts", "full"]) for _ in range(layers))
    recompute = rng.choice([(), ("full",) * layers, given, None, None])
    most = rng.randint(5, 60) * layers // 4 if recompute is None and rng.random() < 0.5 else None
    return Activations(recompute, most, rng.choice([0, 0, rng.randint(1, 40)]))


def every_split(problem: Problem) -> Iterator[list[Piece]]:
    for cuts in combinations(range(1, problem.units), problem.placement.stages - 1):
        borders = [0, *cuts, problem.units]
        yield list(pairwise(borders))


def bottleneck(problem: Problem, pieces: list[Piece]) -> float | None:
    """None where the pieces do not fit the caps."""
    costs = [problem.cost(rank, mine) for rank, mine in enumerate(by_rank(problem, pieces))]
    return None if None in costs else max(cost.seconds for cost in costs if cost is not None)
