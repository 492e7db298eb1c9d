"""Simulated runs against expectations that can be computed, and against what must hold for every run."""

import math
from dataclasses import replace

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.forecast.run_model import Interruption, RunModel
from bagualu.fault_tolerance.forecast.simulate import simulate
from bagualu.fault_tolerance.ledger.totals import CATEGORIES

DAY = 86400.0
ENDS = Interruption("gpu", 1 / 9000, 0.3, loses_node=True)
HANGS = Interruption("network", 1 / 40_000, 250.0)
SILENT = Interruption("silent", 1 / 50_000, 0.0, silent=True)
FULL = RunModel(
    4.3, (ENDS, HANGS, SILENT), checkpoint_steps=60, save_seconds=1.7, durable_seconds=40.0, slowdown=0.02, read_seconds=20.0,
    replica_steps=7, replica_seconds=0.4, restore_seconds=2.0, replica_loss=0.2, pauses=[1.0, 2.0, 4.0], start_seconds=90.0,
    check_steps=10, nodes=64, replicas=16, micro_batches=8, spares=2, swap_seconds=11.0, repair_seconds=6 * 3600.0,
)  # fmt: skip
"""With everything that a run can have."""
VARIANTS = {
    "waits": FULL,
    "elastic": replace(FULL, elastic=True),
    "elastic, later": replace(FULL, elastic=True, rejoin=False),
    "no spares needed": replace(FULL, spares=None),
    "hardly any nodes": replace(FULL, nodes=4, replicas=1, spares=0, elastic=True),
    "equal shares": replace(FULL, spares=0, elastic=True, equal_shares=True),
    "storage alone": replace(FULL, replica_steps=0),
    "slow storage": replace(FULL, durable_seconds=900.0),
}


def surely(runs, expected, digits=4.0):
    """Asserts that the mean of `runs` is `expected`, up to `digits` standard errors."""
    error = runs.std(ddof=1) / math.sqrt(runs.size)
    assert abs(runs.mean() - expected) < digits * error + 1e-12, f"{runs.mean()} is not {expected} +- {error}"


@pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS)
def test_the_categories_add_up_to_the_wall_time_to_the_microsecond(model):
    totals = simulate(model, 5 * DAY, 100, seed=3, intervals=[1, 60, 10**9])
    assert set(totals.microseconds) == set(CATEGORIES)
    assert (sum(totals.microseconds.values()) == totals.wall).all()
    assert totals.wall == 5 * 86400 * 10**6
    for name, part in totals.microseconds.items():
        assert (part >= 0).all(), name
    assert (totals.progress <= totals.ratio + 1e-9).all()
    assert totals.failures.mean() > 20


@pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS)
def test_a_seed_repeats_every_figure(model):
    first, second = (simulate(model, DAY, 20, seed=5) for _ in range(2))
    assert all((first.microseconds[name] == second.microseconds[name]).all() for name in CATEGORIES)
    assert (simulate(model, DAY, 20, seed=6).steps != first.steps).any()


def test_a_run_without_failures_loses_only_its_start_and_its_saves():
    model = RunModel(2.0, checkpoint_steps=10, save_seconds=1.0, start_seconds=30.0, durable_seconds=5.0, read_seconds=9.0)
    totals = simulate(model, 30 + 21 * 100, 3, seed=0)
    seconds = {name: part[0, 0] / 1e6 for name, part in totals.microseconds.items() if part.any()}
    assert seconds == {"start": 30.0, "productive": 2000.0, "checkpoint": 100.0}
    assert (totals.steps == 1000).all()


@pytest.mark.parametrize(("between", "save", "start", "steps"), [(9000, 40, 150, 700), (3000, 200, 0, 100), (500, 5, 60, 50)])
def test_the_ratio_is_the_one_that_can_be_computed(between, save, start, steps):
    """J. Daly (2006), equation 13: failures strike steps, saves and starts alike; checkpoints are durable when training goes on. A
    part of `steps` seconds takes between * exp(start / between) * (exp((steps + save) / between) - 1)."""
    model = RunModel(1.0, [Interruption("all", 1 / between, 0.0)], checkpoint_steps=steps, save_seconds=save, start_seconds=start)
    expected = steps / (between * math.exp(start / between) * (math.exp((steps + save) / between) - 1))
    totals = simulate(model, 400 * between, 400, seed=1)
    surely(totals.failures, 400)
    assert totals.ratio.mean() == pytest.approx(expected, rel=0.01)  # the last part of a run is unfinished: up to half in 400


def test_failures_of_all_kinds_come_as_often_as_their_rates_say():
    totals = simulate(replace(FULL, spares=None, read_seconds=0.0), 20 * DAY, 400, seed=2)
    down = (totals.microseconds["detection"] + totals.microseconds["waiting"]) / 1e6  # in which none strikes
    surely(totals.failures - (20 * DAY - down) * (1 / 9000 + 1 / 40_000 + 1 / 50_000), 0)
    surely(totals.microseconds["detection"] / 1e6 - (20 * DAY - down) * (0.3 / 9000 + 250 / 40_000), 0)


@pytest.mark.parametrize("spares", [0, 1, 3])
def test_a_run_that_waits_for_repairs_is_up_as_often_as_a_queue_says(spares):
    """A birth and death process: `between` seconds from one lost node to the next while it runs, `repair` for each node."""
    between, repair = 5000.0, 4000.0
    lost = replace(ENDS, per_second=1 / between, detection_seconds=0.0)
    model = RunModel(1.0, [lost], checkpoint_steps=1, nodes=100, spares=spares, repair_seconds=repair)
    weights = [(repair / between) ** out / math.factorial(out) for out in range(spares + 2)]
    totals = simulate(model, 1000 * between, 50, seed=4)
    surely(1 - totals.microseconds["waiting"] / totals.wall, sum(weights[:-1]) / sum(weights))


@pytest.mark.parametrize("rejoin", [True, False])
def test_an_elastic_run_goes_on_with_the_nodes_that_are_left(rejoin):
    """Each of 20 nodes is up `up` of the time, whatever the others do; a step is as much slower as nodes are missing."""
    between, repair = 5000.0, 9000.0
    lost = replace(ENDS, per_second=1 / between, detection_seconds=0.0)
    model = RunModel(1.0, [lost], checkpoint_steps=1, nodes=20, replicas=20, spares=0, repair_seconds=repair, elastic=True,
                     rejoin=rejoin)  # fmt: skip
    totals = simulate(model, 1000 * between, 50, seed=4)
    up = 1 / (1 + repair / (20 * between))
    assert totals.ratio.mean() > 0.99
    if rejoin:
        assert totals.progress.mean() == pytest.approx(up, rel=0.003)
        assert totals.rejoins.mean() == pytest.approx(totals.failures.mean(), rel=0.02)
    else:  # nodes that have been repaired stand idle until the next failure
        assert totals.progress.mean() < up - 0.02
        assert not totals.rejoins.any()


def test_an_uneven_share_of_micro_batches_slows_a_step_by_a_whole_one():
    model = RunModel(8.0, nodes=128, replicas=64, micro_batches=4)
    assert model.step_seconds_with(64) == 8.0
    assert model.step_seconds_with(63) == 10.0
    assert model.usable_replicas()[[0, 1, 2, 127, 128]].tolist() == [0, 0, 1, 63, 64]
    equal = replace(model, equal_shares=True)
    assert equal.usable_replicas()[[0, 1, 2, 127, 128]].tolist() == [0, 0, 1, 32, 64]
    assert replace(model, replicas=256).usable_replicas()[[1, 127]].tolist() == [2, 254]
    assert replace(model, micro_batches=None).step_seconds_with(63) == pytest.approx(8.0 * 64 / 63)


def test_replicas_bound_what_a_failure_loses():
    """Without them the steps since the last durable checkpoint are lost, half an interval on average."""
    model = replace(FULL, interruptions=[ENDS, HANGS], slowdown=0.0, replica_loss=0.0, checkpoint_steps=500)
    totals = simulate(model, 20 * DAY, 100, seed=7)
    lost = totals.microseconds["lost"] / 1e6 / totals.failures
    assert (lost < model.replica_steps * (model.step_seconds + model.replica_seconds)).all()
    assert lost.mean() == pytest.approx(model.replica_steps / 2 * model.step_seconds, rel=0.1)
    storage = simulate(replace(model, replica_steps=0), 20 * DAY, 100, seed=7)
    assert (storage.microseconds["lost"] / 1e6 / storage.failures).mean() > 50 * 4.3


def test_replicas_that_are_always_lost_with_the_node_are_worth_nothing():
    model = replace(FULL, interruptions=[ENDS], replica_seconds=0.0)
    useless, none = (
        simulate(replace(model, **change), 9 * DAY, 50, seed=7) for change in ({"replica_loss": 1.0}, {"replica_steps": 0})
    )
    assert (useless.steps == none.steps).all()


def test_a_silent_fault_costs_a_read_but_no_start_and_goes_back_before_it_struck():
    model = RunModel(1.0, [replace(SILENT, per_second=1 / 3000)], checkpoint_steps=100, read_seconds=20.0, start_seconds=500.0,
                     pauses=[70.0])  # fmt: skip
    at_once = simulate(model, 40 * DAY, 50, seed=8)
    assert not at_once.microseconds["waiting"].any()
    read = (at_once.microseconds["start"] / 1e6 - 500) / at_once.failures
    assert read.mean() == pytest.approx(20, rel=0.02)  # some strike while the checkpoint is read
    later = simulate(replace(model, check_steps=80), 40 * DAY, 50, seed=8)
    lost = [(runs.microseconds["lost"] / 1e6 / runs.failures).mean() for runs in (at_once, later)]
    assert lost[0] == pytest.approx(50, rel=0.05)
    assert lost[1] == pytest.approx(50 + 40, rel=0.05)


def test_a_stop_for_a_repaired_node_finishes_its_step_and_saves():
    """With spares enough, steps never change their length, so productive time is whole steps, but for the last of a run."""
    model = replace(FULL, interruptions=[replace(ENDS, per_second=1e-4)], elastic=True, spares=60, slowdown=0.0,
                    checkpoint_steps=10**9, replica_steps=0, repair_seconds=600.0)  # fmt: skip
    totals = simulate(model, 5 * DAY, 200, seed=9)
    assert totals.rejoins.mean() > 20
    rest = totals.microseconds["productive"] - totals.steps * 4_300_000
    assert ((rest >= 0) & (rest < 4_300_000)).all()
    saves = totals.microseconds["checkpoint"] / 41.7e6
    assert (saves <= totals.rejoins).all()
    assert saves.mean() > 0.8 * totals.rejoins.mean()
    # Without other checkpoints a failure, one in 10,000 s, leaves the 600 s until the node was repaired, less a start; at the end
    # of a run nothing is lost.
    assert totals.progress.mean() == pytest.approx(500 / 10_000 + 10_000 / (5 * DAY), rel=0.2)
    later = simulate(replace(model, rejoin=False), 5 * DAY, 200, seed=9)
    assert later.progress.mean() == pytest.approx(10_000 / (5 * DAY), rel=0.2)


def test_a_run_without_a_checkpoint_begins_again_and_reads_none():
    model = RunModel(1.0, [replace(ENDS, loses_node=False)], checkpoint_steps=10**9, read_seconds=300.0, start_seconds=10.0)
    totals = simulate(model, DAY, 40, seed=1)
    assert totals.microseconds["start"].max() <= 10e6 * (1 + totals.failures.max())


def test_silent_faults_are_no_restarts():
    model = RunModel(1.0, [replace(SILENT, per_second=1e-4, detection_seconds=99.0)], pauses=[5.0])
    totals = simulate(model, DAY, 40, seed=1)
    assert totals.failures.any()
    assert not totals.microseconds["waiting"].any()
    assert not totals.microseconds["detection"].any()
    kinds = [replace(ENDS, loses_node=False, per_second=1e-4), replace(SILENT, per_second=1e-3)]
    early = simulate(RunModel(1.0, kinds, pauses=[0.0] * 40 + [50.0], healthy_seconds=DAY), DAY, 40, seed=1)
    assert not early.microseconds["waiting"].any()  # of some 95 faults fewer than 40 restart processes


@pytest.mark.parametrize(("healthy", "detection"), [(600.0, 0.0), (600.0, 250.0), (200.0, 250.0)])
def test_pauses_begin_anew_once_a_run_was_healthy(healthy, detection):
    """A failure every M seconds comes later than H after a restart with probability exp(-H / M), and is noticed after D."""
    between, pauses = 900.0, [1.0, 2.0, 4.0, 8.0]
    kind = replace(ENDS, per_second=1 / between, detection_seconds=detection, loses_node=False)
    model = RunModel(1.0, [kind], pauses=pauses, healthy_seconds=healthy, start_seconds=50.0)
    anew = min(1.0, math.exp((detection - healthy) / between))
    expected = sum(pause * anew * (1 - anew) ** index for index, pause in enumerate(pauses[:-1])) + pauses[-1] * (1 - anew) ** 3
    totals = simulate(model, 1000 * between, 100, seed=1)
    pause = totals.microseconds["waiting"] / 1e6 / totals.failures
    assert pause.mean() == pytest.approx(expected, rel=0.02)


def test_pauses_grow_with_each_restart_of_a_launch():
    model = RunModel(1.0, [replace(ENDS, loses_node=False)], pauses=[1.0, 2.0, 4.0, 8.0], healthy_seconds=DAY)
    totals = simulate(model, DAY, 40, seed=1)
    waiting, restarts = totals.microseconds["waiting"][0], totals.failures[0]
    assert (waiting == (7 + 8 * (restarts - 3)) * 10**6)[restarts >= 3].all()


WORSE = {
    "failures": {"interruptions": [replace(kind, per_second=2 * kind.per_second) for kind in FULL.interruptions]},
    "detection": {"interruptions": [replace(kind, detection_seconds=2 * kind.detection_seconds) for kind in FULL.interruptions]},
    "save": {"save_seconds": 10.0}, "durable": {"durable_seconds": 200.0}, "slowdown": {"slowdown": 0.2},
    "read": {"read_seconds": 300.0}, "replica": {"replica_seconds": 2.0}, "restore": {"restore_seconds": 90.0},
    "loss": {"replica_loss": 0.9}, "pauses": {"pauses": [60.0]}, "start": {"start_seconds": 300.0}, "checks": {"check_steps": 300},
    "spares": {"spares": 0}, "swap": {"swap_seconds": 300.0}, "repair": {"repair_seconds": 4 * 86400.0},
}  # fmt: skip


@pytest.mark.parametrize("change", WORSE.values(), ids=WORSE)
@pytest.mark.parametrize("elastic", [False, True])
def test_what_is_worse_for_a_run_lowers_its_progress(change, elastic):
    before, after = (simulate(replace(model, elastic=elastic), 10 * DAY, 200, seed=1) for model in (FULL, replace(FULL, **change)))
    fall = before.progress - after.progress
    assert fall.mean() > 3 * fall.std() / math.sqrt(fall.size)


IMPOSSIBLE = {
    "rate": ({"interruptions": [replace(ENDS, per_second=-1.0)]}, "failures of gpu"),
    "detection": ({"interruptions": [replace(ENDS, detection_seconds=math.nan)]}, "detection_seconds=nan"),
    "step": ({"step_seconds": 0.0}, "step_seconds=0.0"),
    "interval": ({"checkpoint_steps": 0}, "checkpoint_steps=0"),
    "probability": ({"replica_loss": 1.1}, "replica_loss=1.1"),
    "slowdown": ({"slowdown": 1.0}, "slowdown=1.0"),
    "save": ({"save_seconds": -1.0}, "save_seconds=-1.0"),
    "pause": ({"pauses": [1.0, -2.0]}, "pauses=-2.0"),
    "spares": ({"spares": -1}, "spares=-1"),
    "nodes": ({"nodes": 0}, "nodes=0"),
    "repair": ({"repair_seconds": 0.0}, "repair_hours"),
}


@pytest.mark.parametrize(("change", "named"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_figure_is_refused_by_name(change, named):
    with pytest.raises(RecipeError, match=named) as refused:
        simulate(replace(FULL, **change), DAY, 5, seed=0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("seconds", "runs"), [(0, 5), (-1.0, 5), (math.nan, 5), (math.inf, 5), (DAY, 0)])
def test_a_run_of_no_time_is_refused(seconds, runs):
    with pytest.raises(RecipeError, match="days=14"):
        simulate(FULL, seconds, runs, seed=0)
