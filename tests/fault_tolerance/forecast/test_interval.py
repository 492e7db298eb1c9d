"""The searched interval against the formulas, where what they assume is so."""

import math
from dataclasses import replace

import pytest

from bagualu.fault_tolerance.forecast.interval import best_interval, daly, young
from bagualu.fault_tolerance.forecast.run_model import Interruption, RunModel

YEAR = 3e7


def model(between, save, **others):
    return RunModel(1.0, [Interruption("gpu", 1 / between, 0.0)], save_seconds=save, **others)


@pytest.mark.parametrize(("between", "save", "start"), [(10_000, 5, 120), (3600, 1, 60), (86_400, 100, 600), (100_000, 20, 3)])
def test_the_best_interval_is_that_of_young_and_daly_where_their_assumptions_hold(between, save, start):
    """Exponential failures, a constant cost, small against the time between failures."""
    best = best_interval(model(between, save, start_seconds=start), YEAR, runs=150, seed=0)
    assert best.young == pytest.approx(young(save, between))
    assert best.steps == pytest.approx(best.young, rel=0.05)
    assert best.steps == pytest.approx(best.daly, rel=0.05)
    assert best.shortest < best.steps < best.longest


def test_daly_is_nearer_where_the_cost_is_not_small():
    best = best_interval(model(3000, 300), YEAR, runs=300, seed=0)
    assert best.steps == pytest.approx(best.daly, rel=0.03)
    assert best.steps < 0.85 * best.young


def test_the_formulas():
    assert young(50, 10_000) == 1000
    assert daly(50, 10_000) == pytest.approx(1000 * (1 + 0.05 / 3 + 0.0025 / 9) - 50)
    assert daly(300, 100) == 100


def test_a_write_in_the_background_costs_nothing_until_saves_wait_for_it():
    """It lengthens what a failure loses, whatever the interval; but an interval shorter than it makes training wait."""
    behind = best_interval(model(10_000, 5, durable_seconds=100.0), YEAR, runs=150, seed=0)
    assert behind.steps == pytest.approx(young(5, 10_000), rel=0.05)
    slow = best_interval(model(10_000, 0.01, durable_seconds=100.0), YEAR, runs=150, seed=0)
    assert slow.steps == pytest.approx(100, rel=0.1)
    assert slow.young < 20


def test_slower_steps_beside_a_write_are_a_cost_of_the_save():
    slowed = best_interval(model(10_000, 1.0, durable_seconds=100.0, slowdown=0.09), YEAR, runs=150, seed=0)
    assert slowed.young == pytest.approx(young(10, 10_000))
    assert slowed.steps == pytest.approx(young(10, 10_000), rel=0.06)


def test_a_free_checkpoint_is_saved_after_every_step():
    best = best_interval(RunModel(30.0, [Interruption("gpu", 1e-4, 0.0)]), YEAR, runs=50, seed=0)
    assert best.steps == 1


def test_with_replicas_storage_is_for_the_failures_that_take_them_too():
    replicas = model(2000, 20, replica_steps=10, replica_seconds=0.1, replica_loss=0.05)
    best = best_interval(replicas, YEAR, runs=400, seed=0)
    assert best.young == pytest.approx(young(20, 40_000))
    assert best.steps == pytest.approx(best.young, rel=0.15)
    assert best_interval(replace(replicas, replica_loss=0.0), YEAR, runs=50, seed=0).young == math.inf


def test_there_is_no_best_interval_without_failures():
    assert best_interval(RunModel(1.0), YEAR, runs=5, seed=0) is None
