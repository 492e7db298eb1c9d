"""The optimum of the bottleneck, against every split there is."""

import random

import pytest

from bagualu.parallel.balance.stages.partition import solve
from bagualu.parallel.balance.stages.problem import Problem
from bagualu.parallel.layout import StagePlacement
from tests.parallel.balance.examples import all_forward_then_backward, bottleneck, every_split, random_activations, random_table

PLACEMENTS = [StagePlacement(ranks, chunks, v) for ranks in (1, 2, 3, 4) for chunks in (1, 2, 3) for v in (False, True)
              if ranks * chunks <= 6 and not (v and chunks == 1)]  # fmt: skip


def random_problem(rng: random.Random) -> Problem:
    placement = rng.choice(PLACEMENTS)
    layers = placement.stages + rng.randint(0, max(0, 8 - placement.stages))
    schedule = all_forward_then_backward(placement, rng.randint(1, 3), rng.random() < 0.3)
    speeds = [1.0] * placement.ranks if rng.random() < 0.4 else [rng.uniform(0.3, 1.5) for _ in range(placement.ranks)]
    table = random_table(rng, layers, rng.choice([1, 2, None]))
    caps = None
    if rng.random() < 0.6:
        whole = Problem(table, schedule, speeds, None)
        scale = whole.memory(0, ((0, layers),) + ((layers, layers),) * (placement.chunks - 1))
        caps = [int(scale * rng.uniform(0.2, 1.4) / placement.ranks + 10) for _ in speeds]
    return Problem(table, schedule, speeds, caps, random_activations(rng, layers))


@pytest.mark.parametrize(
    ("cases", "halves"),
    [
        (200, False),
        (25, True),
        pytest.param(4000, False, marks=pytest.mark.slow),
        pytest.param(600, True, marks=pytest.mark.slow),
    ],
)
def test_it_equals_brute_force(cases: int, halves: bool) -> None:
    """Also: a split is found exactly when one fits, it is a split, its bottleneck is what it says, and it is said to be proven. In
    layers and in half layers."""
    rng = random.Random(4)
    fitted = refused = 0
    for case in range(cases):
        problem = random_problem(rng)
        problem = problem.with_halves() if halves else problem
        found = solve(problem)
        values = [value for pieces in every_split(problem) if (value := bottleneck(problem, pieces)) is not None]
        if not values:
            assert found is None, case
            refused += 1
            continue
        assert found is not None, case
        assert [layer for piece in found.pieces for layer in range(*piece)] == list(range(problem.units)), case
        assert len(found.pieces) == problem.placement.stages, case
        assert all(a < b for a, b in found.pieces), case
        assert found.bottleneck_seconds == pytest.approx(bottleneck(problem, found.pieces), rel=1e-12), case
        assert found.bottleneck_seconds == pytest.approx(min(values), rel=1e-8), (case, problem.placement)
        assert found.proven, case
        fitted += 1
    assert fitted > cases // 3
    assert refused > cases // 25


@pytest.mark.parametrize("placement", [StagePlacement(16), StagePlacement(16, 2, True), StagePlacement(8, 2)], ids=str)
@pytest.mark.parametrize("kinds", [1, 2, None])
def test_eighty_layers_on_sixteen_ranks_or_stages_are_proven(placement: StagePlacement, kinds: int | None) -> None:
    rng = random.Random(1)
    for speeds in ([1.0] * placement.ranks, [rng.choice([0.5, 0.8, 1.0]) for _ in range(placement.ranks)]):
        found = solve(Problem(random_table(rng, 80, kinds), all_forward_then_backward(placement, 4), speeds, None))
        assert found is not None
        assert found.proven


def test_a_search_that_is_cut_short_says_how_far_from_the_optimum_it_may_be() -> None:
    rng = random.Random(2)
    table = random_table(rng, 24, 2)
    problem = Problem(table, all_forward_then_backward(StagePlacement(3, 4), 2), [1.0, 0.7, 0.9], None)
    whole, short = solve(problem, 10**7), solve(problem, 400)
    assert whole is not None
    assert short is not None
    assert whole.proven
    assert not short.proven
    assert short.least_possible_seconds <= whole.bottleneck_seconds * (1 + 1e-9) <= short.bottleneck_seconds * (1 + 2e-9)


def test_layers_that_cost_nothing_are_split_too() -> None:
    table = random_table(random.Random(0), 4)
    free = [type(table.head)(layer.name, 0.0, 0.0, 0.0) for layer in (table.embedding, *table.layers, table.head)]
    table = type(table)(free[0], free[1:-1], free[-1], "free")
    found = solve(Problem(table, all_forward_then_backward(StagePlacement(2), 1), [1.0, 1.0], None))
    assert found is not None
    assert found.bottleneck_seconds == 0
