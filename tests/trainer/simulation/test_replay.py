"""A replay of the traces of real recipes: its parts add up, it is the walk over every event, and every axis has its part."""

from dataclasses import replace

import pytest

from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.topology import Cluster
from bagualu.parallel.pipeline.registry import SCHEDULES
from bagualu.parallel.simulation.events import Operator
from bagualu.parallel.simulation.replay import Replayed, ReplayedRole, replay
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.simulation.roles import trace_world
from bagualu.trainer.simulation.trace import Traced
from tests.parallel.simulation.held import peak

SMALL = ["data.source=random", "data.sequence_length=32", "model.hidden=48", "model.ffn=96", "model.layers=8"]
SLOW = ("gpipe", "zb_h1", "v_half", "dualpipe_v")
"""Schedules that only the slow tests replay."""


def slow_links(devices: int) -> Cluster:
    """Nodes of so many devices, whose links are so slow that communication takes as long as computation."""
    cluster = load_cluster("h100")
    inner, outer = cluster.parts[0].tiers
    tiers = replace(inner, devices=devices, bytes_per_second=4e8), replace(outer, bytes_per_second=1e8)
    return replace(cluster, parts=(replace(cluster.parts[0], tiers=tiers),))


def seconds_of(rank: int, operator: Operator) -> float:
    return 1e-6 + operator.flops / 1e11 + (operator.read_bytes + operator.written_bytes) / 1e10


def replayed(name: str, *words: str, devices: int = 2, shares: list[float] | None = None) -> Replayed:
    recipe = compose([f"recipe={name}", *SMALL, "data.global_batch=16", "train.dtype=bfloat16", *words])
    world = recipe.world_size()
    roles, layout = trace_world(recipe, world, Traced(shares=shares)), recipe.validate(world)
    cluster = slow_links(devices).for_world(world)
    quick, plain = (replay(roles, layout, cluster, seconds_of, plain=plain) for plain in (False, True))
    assert quick.step_seconds == pytest.approx(plain.step_seconds, rel=1e-12)
    for ours, plains in zip(quick.roles, plain.roles, strict=True):
        assert sum(parts(ours)) == pytest.approx(quick.step_seconds, rel=1e-12)
        assert list(parts(ours)) == pytest.approx(list(parts(plains)), rel=1e-9, abs=1e-12)
        assert ours.marks == pytest.approx(plains.marks, rel=1e-12)
        assert (ours.peak.bytes, ours.peak.by_kind) == (plains.peak.bytes, plains.peak.by_kind)
        traced = peak(ours.role.trace)
        assert (ours.peak.bytes, ours.peak.by_kind, ours.peak.section) == (traced.bytes, traced.by_kind, traced.section)
        seconds = sum(seconds_of(0, operator) for operator in ours.role.trace.operators())
        assert ours.busy_seconds == pytest.approx(seconds, rel=1e-9)
    return quick


def parts(one: ReplayedRole) -> list[float]:
    times = [[seconds for _, seconds in sorted(times.items())] for times in (one.busy, one.exposed)]
    return [*times[0], *times[1], one.pipeline_seconds, one.imbalance_seconds]


@pytest.mark.parametrize("schedule", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SCHEDULES])
def test_a_pipeline_of_every_schedule(schedule: str) -> None:
    found = replayed("tiny_dense", "parallel.pipeline=4", f"parallel.schedule={schedule}", "parallel.tensor=2", "parallel.data=2")
    assert 0 < found.bubble < 1  # tests/parallel/simulation/test_replay.py compares it with a timeline
    assert {"tensor", "fold", "pipeline", "world"} <= set(found.exposed())


@pytest.mark.parametrize(
    ("name", "words", "axes"),
    [
        ("tiny_dense", ["parallel.tensor=2", "parallel.sequence=true", "train.micro_batch=2"], {"tensor"}),
        ("tiny_dense", ["parallel.data=4", "parallel.zero=3", "train.recompute=full"], {"fold"}),
        ("tiny_dense", ["parallel.data=4", "parallel.zero=2"], {"fold"}),
        ("tiny_dense", ["parallel.pipeline=2", "parallel.schedule=1f1b", "model.tie_embeddings=true"], {"ends", "pipeline"}),
        ("moe_tiny", ["parallel.data=4", "parallel.expert=2", "parallel.tensor=2"], {"tensor", "expert", "fold", "replica"}),
    ],
)
@pytest.mark.parametrize("devices", [2, 16])
def test_every_axis(name: str, words: list[str], axes: set[str], devices: int) -> None:
    """On nodes of two devices, and on a single node, whose links all axes share."""
    assert axes <= set(replayed(name, *words, devices=devices).exposed())


def test_uneven_experts_hold_the_others_up() -> None:
    words = ["parallel.data=4", "parallel.expert=2"]
    even, uneven = (replayed("moe_tiny", *words, shares=shares) for shares in (None, [0.4, 0.3, 0.2, 0.1]))
    assert uneven.step_seconds > even.step_seconds
    full, spare = uneven.roles
    assert spare.imbalance_seconds > full.imbalance_seconds
    assert full.busy_seconds > spare.busy_seconds
