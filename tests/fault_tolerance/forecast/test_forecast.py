"""From a recipe and a cluster to what is printed."""

import functools
import json
import math
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import pytest

from bagualu.comm.cluster_file import cluster_names, load_cluster
from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.config import CheckpointConfig, GuardConfig, RestartConfig
from bagualu.fault_tolerance.forecast.assumptions import Assumptions
from bagualu.fault_tolerance.forecast.forecast import Settings, Workload, forecast, run_model
from bagualu.fault_tolerance.forecast.influence import influences
from bagualu.fault_tolerance.forecast.interval import best_interval
from bagualu.fault_tolerance.forecast.report import FailureReport
from bagualu.fault_tolerance.forecast.run_model import RunModel

DAY = 86400.0
H100 = load_cluster("h100")
WORK = Workload(16_384, 10.0, 405e9 * 12, replicas=128, micro_batches=16)
SETTINGS = Settings(CheckpointConfig(), RestartConfig(), GuardConfig())
GIVEN = Assumptions()


def modelled(work=WORK, settings=SETTINGS, assumptions=GIVEN, cluster=H100, **others):
    return run_model(cluster, work, settings, assumptions, **others)


def assuming(assumptions):
    return modelled(assumptions=assumptions)


def test_the_failures_of_llama_3_are_as_many_as_were_published():
    model = modelled()
    assert 54 * DAY / model.mean_seconds_between_failures == pytest.approx(419, abs=1)
    time = forecast(model, 54 * DAY, runs=100)
    assert time.failures.mean == pytest.approx(415, abs=6)  # none strikes while the run is down
    assert time.failures.low < 400 < 430 < time.failures.high


def test_times_of_a_checkpoint_come_from_its_bytes_and_the_storage():
    share = 405e9 * 12 / 16_384
    model = modelled()
    assert model.save_seconds == pytest.approx(share / GIVEN.copy_bytes_per_second)
    assert model.durable_seconds == pytest.approx(share / 1.22e8 + 2 * 10.0)  # committed two steps after it was written
    assert model.read_seconds == pytest.approx(share / 1.22e8 + GIVEN.resume_seconds)
    few = modelled(replace(WORK, writers=128))  # one replica writes; it has the storage for itself, up to what a device can
    assert few.durable_seconds == pytest.approx(128 * share / 5e9 + 20.0)
    blocking = modelled(settings=replace(SETTINGS, checkpoint=CheckpointConfig(asynchronous=False)))
    assert blocking.save_seconds == pytest.approx(share / 1.22e8)
    assert blocking.durable_seconds == 0


def test_the_recipe_says_which_mechanisms_there_are():
    assert modelled().replica_steps == 0
    assert modelled(settings=replace(SETTINGS, checkpoint=CheckpointConfig(replica_every=5))).replica_steps == 5
    never = modelled(settings=replace(SETTINGS, checkpoint=CheckpointConfig(every=0)))
    assert forecast(never, DAY, runs=20).categories["checkpoint"] == 0
    elastic = modelled(settings=replace(SETTINGS, restart=RestartConfig(elastic=True, wait_seconds=77)), spares=1)
    assert (elastic.elastic, elastic.swap_seconds, elastic.spares) == (True, 77, 1)
    assert modelled().pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert modelled().healthy_seconds == 600
    assert modelled(settings=replace(SETTINGS, restart=RestartConfig(backoff_reset_seconds=7.0))).healthy_seconds == 7


@pytest.mark.parametrize(("hang", "timeout", "noticed"), [(300.0, 600.0, 300.0), (300.0, 200.0, 150.0), (0.0, 600.0, 600.0)])
def test_a_hang_is_noticed_when_the_watchdog_or_the_timeout_says_so(hang, timeout, noticed):
    model = modelled(settings=replace(SETTINGS, restart=RestartConfig(hang_seconds=hang), timeout_seconds=timeout))
    assert max(kind.detection_seconds for kind in model.interruptions) == noticed


def test_software_alone_does_not_take_its_node_away():
    assert {kind.component for kind in modelled().interruptions if not kind.loses_node} == {"software", "silent"}


def test_a_node_is_a_machine_and_not_all_that_fast_links_join():
    rates = {"gpu": 1e-5}
    gb200 = load_cluster("gb200")
    cluster = replace(gb200, storage=H100.storage, parts=(replace(gb200.parts[0], failures_per_device_hour=rates),))
    assert modelled(replace(WORK, world=512), cluster=cluster).nodes == 128


def test_nodes_and_replicas_come_from_the_layout():
    model = modelled(replace(WORK, equal_shares=False))
    assert (model.nodes, model.usable_replicas()[2047]) == (2048, 127)
    assert modelled().usable_replicas()[2047] == 64  # the next number that divides 2,048 sequences
    assert modelled(replace(WORK, replicas=8192, equal_shares=False)).usable_replicas()[2047] == 8188


def test_the_failures_of_a_mixed_cluster_are_those_of_its_parts():
    mixed = load_cluster("mixed_h100_a100")
    if mixed.storage is None:
        with pytest.raises(RecipeError, match="has no storage"):
            modelled(cluster=mixed)
        mixed = replace(mixed, storage=H100.storage)
    work = replace(WORK, world=512)
    rate = sum(part.devices * sum(part.failures_per_device_hour.values()) / 3600 for part in mixed.for_world(512).parts)
    assert 1 / modelled(work, cluster=mixed).mean_seconds_between_failures == pytest.approx(rate)


def test_every_cluster_that_ships_can_be_forecast_or_says_what_is_missing():
    for name in cluster_names():
        cluster = load_cluster(name)
        whole = cluster.storage and all(part.failures_per_device_hour for part in cluster.parts)
        with nullcontext() if whole else pytest.raises(RecipeError, match=f"cluster={name} has no"):
            assert modelled(replace(WORK, world=512), cluster=cluster).mean_seconds_between_failures > 3600


BETTER = {
    "failure_factor": 0.5, "hang_fraction": 0.0, "exit_seconds": 0.0, "workers_seconds": 0.0, "connect_seconds_per_device": 0.0,
    "resume_seconds": 0.0, "warm_up_steps": 0.0, "copy_bytes_per_second": 1e13, "verify_bytes_per_second": 1e13,
    "replica_bytes_per_second": 1e13, "replica_loss": 0.0, "repair_hours": 1.0, "storage_factor": 20.0,
}  # fmt: skip
WORSE = {"silent_per_device_hour": 1e-5, "write_slowdown": 0.2}
SWAPPED = {"swap_seconds": 0.0}


def test_every_assumption_has_an_effect():
    """In a run that has everything; spare nodes join by themselves in an elastic run, so swap_seconds counts in others only."""
    assert BETTER.keys() | WORSE.keys() | SWAPPED.keys() == {entry.name for entry in fields(Assumptions)}
    slow = replace(H100, storage=replace(H100.storage, read_bytes_per_second=1e6, write_bytes_per_second=1e6))
    base = GIVEN.changed({
        "exit_seconds": 9.0, "workers_seconds": 60.0, "resume_seconds": 60.0, "replica_loss": 0.3, "copy_bytes_per_second": 1e7,
        "verify_bytes_per_second": 1e6, "replica_bytes_per_second": 1e7,
    })  # fmt: skip
    settings = Settings(CheckpointConfig(every=200, replica_every=20), RestartConfig(elastic=True), GuardConfig())

    def progress(settings=settings, **changes):
        work = replace(WORK, equal_shares=False)
        model = modelled(work, settings, base.changed(changes), slow, spares=1)
        return forecast(model, 15 * DAY, runs=40).progress.mean

    for name, value in BETTER.items():
        assert progress(**{name: value}) > progress() + 1e-5, name
    for name, value in WORSE.items():
        assert progress(**{name: value}) < progress() - 1e-5, name
    fixed = replace(settings, restart=RestartConfig())
    assert progress(settings=fixed, swap_seconds=0.0) > progress(settings=fixed)


def test_the_default_of_an_assumption_lies_in_its_range_and_has_a_source():
    for entry in fields(Assumptions):
        low, high, source = (entry.metadata[name] for name in ("low", "high", "source"))
        assert low <= entry.default <= high, entry.name
        assert low < high, entry.name
        assert source.split(":")[0] in ("measured", "published", "assumed"), entry.name


@functools.cache
def influences_on_the_whole():
    return influences(assuming, GIVEN, 10 * DAY, runs=40)


def test_influences_are_sorted_and_elasticities_have_the_right_sign():
    found = influences_on_the_whole()
    assert [influence.span for influence in found] == sorted((influence.span for influence in found), reverse=True)
    by_name = {influence.name: influence for influence in found}
    assert by_name["failure_factor"].elasticity == pytest.approx(1, abs=0.15)  # what is lost grows with the failures
    assert by_name["failure_factor"].progress_at_low > by_name["failure_factor"].progress_at_high
    assert by_name["storage_factor"].elasticity < 0
    assert by_name["replica_loss"].span == 0  # there are no replicas


def report(settings=SETTINGS, **others):
    model = modelled(settings=settings, **others)
    best = best_interval(model, 14 * DAY, 50, 0)
    at_best = forecast(replace(model, checkpoint_steps=best.steps), 14 * DAY, 50)
    time = forecast(model, 14 * DAY, 50)
    return FailureReport(model, time, best, at_best, influences_on_the_whole(), GIVEN, settings.restart.limit)


def test_the_report_says_what_comes_out():
    lines = report().lines()
    assert lines[0].startswith("failures 110 in 14 days (90% of runs ")
    assert "one every 3.09 h: gpu 47%, gpu_memory 17%, software 15%, host 11%, network 10%" in lines[0]
    assert lines[1].startswith("         restart.limit=3 would end the launch; give restart.limit=2")
    assert lines[2].startswith("training 94.")
    assert lines[3].startswith("lost     repeated steps 4.")
    assert lines[4].startswith("saves    best checkpoint.every=")
    assert "Young" in lines[4]
    assert lines[5].startswith("moved by failure_factor=1: 9")
    assert lines[6].startswith("         ")
    assert all(len(line) <= 132 for line in lines)


def test_a_run_that_never_fails_is_reported():
    time = forecast(RunModel(10.0), DAY, 5)
    lines = FailureReport(RunModel(10.0), time, None, None, [], GIVEN, 3).lines()
    whole = "100.0% (90% of runs 100.0% to 100.0%; the mean +-0.00%) effective training time"
    assert lines == ["failures none in 24 h", f"training {whole}", "lost     nothing"]


def test_the_report_warns_of_slower_steps():
    elastic = replace(SETTINGS, restart=RestartConfig(elastic=True, limit=500))
    lines = report(elastic, spares=0).lines()
    assert any("some steps are slower" in line for line in lines)
    assert not any("restart.limit" in line for line in lines)


def test_the_document_is_json():
    document = json.loads(json.dumps(report().document(), allow_nan=False))
    assert set(document["effective_training_time_ratio"]) == {"mean", "low", "high", "mean_error"}
    assert document["checkpoint_interval"]["steps"] == 100
    assert sum(document["categories"].values()) == pytest.approx(document["seconds"])
    assert all(entry["source"] for entry in document["assumptions"].values())


def test_what_is_missing_or_impossible_is_refused():
    reliable = replace(H100.parts[0], failures_per_device_hour={})
    lacking = {"storage": replace(H100, storage=None), "failures_per_device_hour": replace(H100, parts=(reliable,))}
    for named, cluster in lacking.items():
        with pytest.raises(RecipeError, match=f"cluster=h100 has no {named}"):
            modelled(cluster=cluster)
    with pytest.raises(RecipeError, match="spares=-1"):
        modelled(spares=-1)
    with pytest.raises(RecipeError, match="step_seconds=0"):
        modelled(replace(WORK, step_seconds=0.0))
    with pytest.raises(RecipeError, match="days=14"):
        forecast(modelled(), 0)


@pytest.mark.parametrize(("key", "value", "named"), [
    ("repair_hour", 3, "did you mean repair_hours"), ("wings", 3, "there are failure_factor, "),
    ("repair_hours", "soon", "must be a number"), ("failure_factor", -1, "at least 0"), ("hang_fraction", 1.5, "at most 1"),
    ("copy_bytes_per_second", 0, "above 0"), ("repair_hours", math.nan, "finite"), ("storage_factor", 0, "above 0"),
])  # fmt: skip
def test_a_wrong_assumption_is_refused_with_the_fix(key, value, named):
    with pytest.raises(RecipeError, match=named) as refused:
        GIVEN.changed({key: value})
    assert "\n" not in str(refused.value)


def test_the_page_lists_every_assumption_with_its_value_and_source():
    page = (Path(__file__).parents[3] / "docs/design/failures.md").read_text()
    for entry in fields(Assumptions):
        low, high, source = (entry.metadata[name] for name in ("low", "high", "source"))
        assert f"| `{entry.name}` | {entry.default:.3g} | {low:.3g} to {high:.3g} | {source} |" in page, entry.name
