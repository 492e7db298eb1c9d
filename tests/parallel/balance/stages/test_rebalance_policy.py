"""When layers move: soon and once when a rank stays slow, never for noise, and seldom when slowness comes and goes."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from bagualu.parallel.balance.stages import rebalance_policy
from bagualu.parallel.balance.stages.choose import choose_split
from bagualu.parallel.balance.stages.cost import CostTable, LayerCost
from bagualu.parallel.balance.stages.forecast import Split, forecast_split
from bagualu.parallel.balance.stages.problem import Problem
from bagualu.parallel.balance.stages.rebalance_policy import Watch
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.parallel.pipeline.schedules.schedule import Schedule

LAYERS, MICRO_BATCHES = 16, 8


def layer(name: str, seconds: float) -> LayerCost:
    return LayerCost(name, seconds, seconds, seconds)


TABLE = CostTable(layer("embedding", 0.1), [layer(str(i), 1.0) for i in range(LAYERS)], layer("head", 0.5), "drawn")


class Cluster:
    """Ranks that are as busy as the cost table says, divided by their true speed, give or take some noise."""

    def __init__(self, ranks: int, schedule: str = "1f1b", noise: float = 0.0, seed: int = 0) -> None:
        self.schedule = compute_schedule(schedule, ranks, MICRO_BATCHES)
        self.split = choose_split(TABLE, self.schedule)
        self.watch = Watch(TABLE, self.schedule, self.split, threshold=0.05, windows=3)
        self.moves = 0
        self.noise, self.random = noise, random.Random(seed)

    def window(self, speeds: list[float], steps_left: int = 1000, move_seconds: float = 1.0) -> Split | None:
        problem = Problem(TABLE, self.schedule, speeds, None)
        pieces = problem.pieces(self.split.slices)
        times = [problem.stage_times(stage, piece).total for stage, piece in enumerate(pieces)]
        busy = [
            sum(times[stage] for stage in stages) * (1 + self.random.uniform(-self.noise, self.noise))
            for stages in problem.stages_of
        ]
        proposal = self.watch.after_window(busy, steps_left, lambda _: move_seconds)
        if proposal is None:
            return None
        self.split = proposal.split
        self.watch.moved(proposal.split)
        self.moves += 1
        return proposal.split


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zb_v"])
def test_a_rank_that_stays_slow_gets_fewer_layers_after_the_third_window(schedule: str) -> None:
    cluster = Cluster(4, schedule)
    speeds = [1.0, 1.0, 0.5, 1.0]
    for _ in range(3):
        assert cluster.window([1.0] * 4) is None
    assert all(cluster.window(speeds) is None for _ in range(2))
    found = cluster.window(speeds)
    assert found is not None
    best = choose_split(TABLE, cluster.schedule, speeds)
    assert found.slices == best.slices
    assert all(cluster.window(speeds) is None for _ in range(20)), "once is enough"


def test_what_is_best_already_stays() -> None:
    cluster = Cluster(4)
    cluster.watch = Watch(TABLE, cluster.schedule, choose_split(TABLE, cluster.schedule, [1, 1, 0.5, 1]), 0.05, 3)
    cluster.split = choose_split(TABLE, cluster.schedule, [1, 1, 0.5, 1])
    assert all(cluster.window([1, 1, 0.5, 1]) is None for _ in range(10))


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_nothing(seed: int) -> None:
    """In every window, the speed of each rank differs by up to the threshold, in either direction."""
    cluster = Cluster(4, noise=0.05, seed=seed)
    assert all(cluster.window([1.0] * 4) is None for _ in range(80))


def test_two_slow_windows_move_nothing() -> None:
    cluster = Cluster(4)
    for index in range(100):
        assert cluster.window([0.3 if index % 5 in (0, 1) else 1.0, 1.0, 1.0, 1.0]) is None


def test_a_gain_smaller_than_the_move_costs_is_not_worth_it() -> None:
    cluster = Cluster(4)
    slow = [1.0, 1.0, 0.5, 1.0]
    problem = Problem(TABLE, cluster.schedule, slow, None)
    now = forecast_split(problem, problem.pieces(cluster.split.slices)).forecast
    then = choose_split(TABLE, cluster.schedule, slow).forecast
    gain = now.step_seconds - then.step_seconds
    for _ in range(5):
        assert cluster.window(slow, steps_left=10, move_seconds=10 * gain * 1.01) is None
    assert cluster.window(slow, steps_left=10, move_seconds=10 * gain * 0.99) is not None


@pytest.fixture
def _choices_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal speeds, equal split: the same few come again and again, for the same pipeline."""
    known: dict[tuple[float, ...], Split] = {}

    def choose(table: CostTable, schedule: Schedule, speeds: Sequence[float], *given: Any) -> Split:
        if tuple(speeds) not in known:
            known[tuple(speeds)] = choose_split(table, schedule, speeds, *given)
        return known[tuple(speeds)]

    monkeypatch.setattr(rebalance_policy, "choose_split", choose)


@pytest.mark.usefixtures("_choices_remembered")
@pytest.mark.parametrize("period", [2, 3, 4, 6, 10])
def test_slowness_that_comes_and_goes_does_not_swing_the_layers(period: int) -> None:
    """Windows of 400, in turns slow and not: a few moves at first, then only what lasts long enough to be worth it."""
    cluster = Cluster(4)
    for index in range(400):
        cluster.window([1.0, 0.5 if index // period % 2 else 1.0, 1.0, 1.0])
    assert cluster.moves <= 2 + 2 * (period.bit_length())


def test_caution_is_forgotten() -> None:
    cluster = Cluster(4)
    for speeds in ([1, 0.5, 1, 1], [1, 1, 1, 1]):
        while cluster.window(list(map(float, speeds))) is None:
            pass
    assert cluster.watch.patience == 12
    for _ in range(8 * 12 + 8 * 6):
        cluster.window([1.0] * 4)
    assert cluster.watch.patience == 3


def test_a_move_that_failed_is_not_tried_again_at_once() -> None:
    cluster = Cluster(4)
    slow = [1.0, 1.0, 0.5, 1.0]
    tries = 0
    for _ in range(60):
        problem = Problem(TABLE, cluster.schedule, slow, None)
        pieces = problem.pieces(cluster.split.slices)
        busy = [sum(problem.stage_times(stage, pieces[stage]).total for stage in mine) for mine in problem.stages_of]
        if cluster.watch.after_window(busy, 1000, lambda _: 1.0):
            tries += 1
            cluster.watch.failed()
    assert tries == 4  # after 3, 6, 12, 24 looks


def test_nearly_the_same_speeds_are_not_chosen_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def choose(*given: object) -> Split:
        chosen.append(given)
        return choose_split(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(rebalance_policy, "choose_split", choose)
    cluster = Cluster(4, noise=0.004)
    for _ in range(30):
        cluster.window([1.0, 1.0, 0.5, 1.0], move_seconds=1e9)
    assert 1 <= len(chosen) <= 5
