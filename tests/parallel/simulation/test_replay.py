"""A replay of small traces, on cases computed by hand and against the plain walk over all their events."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from bagualu.comm.calls import Communication, Waited
from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.cost import collective_seconds
from bagualu.comm.errors import CommunicationError
from bagualu.comm.topology import Cluster
from bagualu.parallel.layout import Layout
from bagualu.parallel.mesh import message_group
from bagualu.parallel.pipeline.registry import SCHEDULES, compute_schedule
from bagualu.parallel.pipeline.schedules.schedule import PASSES, SENDS, Action, Kind, Schedule, with_messages
from bagualu.parallel.pipeline.timeline import per_kind, simulate
from bagualu.parallel.simulation.events import Allocation, Event, Free, Operator, RankTrace, Role, Section
from bagualu.parallel.simulation.replay import Replayed, replay
from tests.parallel.simulation.held import peak

MB = 10**6
CLUSTER = load_cluster("h100")


def takes(seconds: float) -> Operator:
    """An operator that takes so long."""
    return Operator(f"takes {seconds}", (), (), 0, 0, round(seconds * MB))


def seconds_of(rank: int, operator: Operator) -> float:
    return operator.flops / MB


def called(kind: str, group: str, size: int, size_bytes: int = 0, peer: int | None = None) -> list[Event]:
    """A call, and the wait for it."""
    return [Communication(kind, group, size, size_bytes, peer), Waited(kind, group, peer)]


def section(*events: Event, phase: str = "forward", action: Action | None = None) -> Section:
    return Section(phase, action, list(events))


def role(*sections: Section, rank: int = 0, ranks: int = 1, pipeline: int = 0, **more: Any) -> Role:
    start = section(Allocation(0, 100), phase="start")
    return Role(RankTrace(rank, [start, *sections], ["parameters", "activations"]), ranks, pipeline, 1, **more)


def run(roles: Sequence[Role], layout: Layout, cluster: Cluster = CLUSTER, **more: Any) -> Replayed:
    """A replay, of which the parts add up and the plain walk gives the same."""
    replayed = replay(roles, layout, cluster, seconds_of, **more)
    plain = replay(roles, layout, cluster, seconds_of, plain=True, **{key: value for key, value in more.items() if key != "spans"})
    assert replayed.step_seconds == pytest.approx(plain.step_seconds, rel=1e-12)
    for ours, plains in zip(replayed.roles, plain.roles, strict=True):
        assert sum(parts(ours)) == pytest.approx(replayed.step_seconds, rel=1e-12)
        assert ours.busy_seconds == pytest.approx(sum(ours.operators.values()), rel=1e-12)
        assert ours.exposed == pytest.approx(plains.exposed, rel=1e-9, abs=1e-12)
        assert ours.pipeline_seconds == pytest.approx(plains.pipeline_seconds, rel=1e-9, abs=1e-12)
        assert ours.peak.seconds == pytest.approx(plains.peak.seconds, rel=1e-12)
        assert (ours.peak.bytes, ours.peak.by_kind) == (plains.peak.bytes, plains.peak.by_kind)
    return replayed


def parts(replayed: Any) -> Iterator[float]:
    yield from replayed.busy.values()
    yield from replayed.exposed.values()
    yield from (replayed.pipeline_seconds, replayed.imbalance_seconds, replayed.straggler_seconds)


def test_a_tensor_group_waits_for_its_own_collective() -> None:
    layout = Layout(tensor=8)
    reduced = called("all_reduce", "tensor", 8, 100 * MB)
    only = role(section(takes(1), *reduced, takes(2)), section(takes(3), *reduced, phase="backward"), ranks=8)
    replayed = run([only], layout)
    cost = collective_seconds(CLUSTER, "all_reduce", 100 * MB, range(8))
    assert replayed.step_seconds == pytest.approx(6 + 2 * cost)
    (result,) = replayed.roles
    assert result.busy == pytest.approx({"forward": 3, "backward": 3})
    assert result.exposed == pytest.approx({"tensor": 2 * cost})
    assert replayed.bubble == 0


def test_a_reduction_runs_beside_computation_until_it_is_waited_for() -> None:
    """Its group's ranks are on different nodes, so it crosses the network."""
    layout = Layout(data=16, tensor=8)
    begin, wait = called("all_reduce", "fold", 16, 1000 * MB)
    cost = collective_seconds(CLUSTER, "all_reduce", 1000 * MB, range(0, 128, 8))
    for computes in (cost / 2, 2 * cost):
        only = role(section(takes(1), begin, takes(computes)), section(wait, takes(1), phase="reduce"), ranks=128)
        replayed = run([only], layout)
        assert replayed.step_seconds == pytest.approx(2 + max(cost, computes), abs=1e-5)
        assert replayed.roles[0].exposed.get("fold", 0.0) == pytest.approx(max(0.0, cost - computes), abs=1e-5)


def test_collectives_of_two_axes_share_the_network() -> None:
    layout = Layout(data=16, tensor=8, expert=2)
    events = [call for group, size in (("fold", 16), ("replica", 8)) for call in called("all_reduce", group, size, 1000 * MB)]
    together = role(section(events[0], events[2], events[1], events[3]), ranks=128)
    alone = [role(section(*events[:2]), ranks=128), role(section(*events[2:]), ranks=128)]
    apart = sum(run([one], layout).step_seconds for one in alone)
    assert run([together], layout).step_seconds == pytest.approx(apart, rel=0.01)  # but for latencies, which overlap


def pipeline(schedule: Schedule, cost: Any, micro_bytes: int = 0) -> list[Role]:
    """The roles of a pipeline whose passes take what `cost` says."""
    placement, roles = schedule.placement, []
    for rank, actions in enumerate(with_messages(schedule).actions):
        sections = []
        for action in actions:
            if action.kind in PASSES:
                events: list[Event] = [takes(float(cost(action)))]
            else:
                sends, gradients = action.kind in SENDS, action.kind in (Kind.SEND_GRADIENT, Kind.RECEIVE_GRADIENT)
                peer = placement.rank_of(action.stage + (1 if sends is not gradients else -1))
                source, destination = (rank, peer) if sends else (peer, rank)
                group = message_group(gradients, source, destination)
                events = called("send" if sends else "receive", group, placement.ranks, micro_bytes, peer)[: 1 if sends else 2]
            sections.append(section(*events, action=action))
        roles.append(role(*sections, rank=rank, pipeline=rank))
    return roles


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("costs", [(1, 1, 1), (2, 3, 1), (5, 8, 3)])
def test_a_pipeline_of_free_messages_takes_what_its_timeline_says(name: str, costs: tuple[int, int, int]) -> None:
    schedule, cost = compute_schedule(name, 4, 8), per_kind(*costs)
    free = replace(CLUSTER, start_seconds=0.0, parts=(replace(CLUSTER.parts[0], tiers=tuple(
        replace(tier, latency_seconds=0.0) for tier in CLUSTER.parts[0].tiers)),))  # fmt: skip
    replayed, timeline = run(pipeline(schedule, cost), Layout(pipeline=4), free), simulate(schedule, cost)
    assert replayed.step_seconds == pytest.approx(float(timeline.end), rel=1e-12)
    assert replayed.bubble == pytest.approx(float(timeline.bubble), rel=1e-12)
    for rank, result in enumerate(replayed.roles):
        passes = [(item.action, start, end) for item, start, end in result.passes() if item.action and item.action.kind in PASSES]
        wanted = [(span.action, float(span.start), float(span.end)) for span in timeline.ranks[rank]]
        assert [action for action, *_ in passes] == [action for action, *_ in wanted]
        for (_, *ours), (_, *theirs) in zip(passes, wanted, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-12)


def test_a_message_costs_both_ranks_when_the_receiver_reaches_it() -> None:
    """On an accelerator a receive begins when the stream of the receiver has done all before it."""
    size, layout = 100 * MB, Layout(pipeline=2)
    (send, _), receive = called("send", "pipeline", 2, size, 1), called("receive", "pipeline", 2, size, 0)
    waits = section(Waited("send", "pipeline", 1), takes(1), phase="reduce")
    first = role(section(takes(2)), section(send, action=Action(Kind.SEND_ACTIVATION, 0, 0)), section(takes(1)), waits)
    second = role(section(takes(5)), section(*receive), section(takes(1)), rank=1, pipeline=1)
    replayed = run([first, second], layout)
    cost = collective_seconds(CLUSTER, "p2p", size, range(2))
    early, late = replayed.roles
    assert (early.end_seconds, late.end_seconds) == (pytest.approx(6 + cost), pytest.approx(6 + cost))
    assert early.pipeline_seconds == pytest.approx(2)
    assert early.exposed == late.exposed == {"pipeline": pytest.approx(cost)}
    assert late.pipeline_seconds == 0


def test_tied_embeddings_join_the_first_and_the_last_rank() -> None:
    layout, size = Layout(pipeline=4), 10 * MB
    reduced = called("all_reduce", "ends", 2, size)
    roles = [role(section(takes(1 + rank), *(reduced if rank in (0, 3) else ())), rank=rank, pipeline=rank) for rank in range(4)]
    first, *between, last = run(roles, layout).roles
    cost = collective_seconds(CLUSTER, "all_reduce", size, range(0, 4, 3))
    assert first.end_seconds == last.end_seconds == pytest.approx(4 + cost)
    assert (first.pipeline_seconds, last.pipeline_seconds) == (pytest.approx(3), 0)
    assert [result.pipeline_seconds for result in between] == [pytest.approx(2 + cost), pytest.approx(1 + cost)]


def test_ranks_with_more_rows_hold_up_their_expert_group() -> None:
    layout = Layout(data=4, expert=2)
    exchanged = called("all_to_all", "expert", 2, 10 * MB), called("all_to_all", "expert", 2, 20 * MB)
    light = role(section(takes(1), *exchanged[0]), ranks=2, coordinates=(range(0, 4, 2),))
    heavy = role(section(takes(3), *exchanged[1]), rank=1, ranks=2, coordinates=(range(1, 4, 2),))
    first, second = run([light, heavy], layout).roles
    cost = collective_seconds(CLUSTER, "all_to_all", 20 * MB, range(2))  # the larger part decides
    assert first.end_seconds == second.end_seconds == pytest.approx(3 + cost)
    assert (first.imbalance_seconds, first.pipeline_seconds) == (pytest.approx(2), 0)
    apart = called("all_reduce", "replica", 2, 10 * MB)  # ranks with the same experts are of one class
    first, second = run([replace_last(light, apart), replace_last(heavy, apart)], layout).roles
    assert first.end_seconds == pytest.approx(second.end_seconds - 2)


def replace_last(one: Role, events: list[Event]) -> Role:
    *before, last = one.trace.sections
    return replace(one, trace=replace(one.trace, sections=[*before, replace(last, events=[last.events[0], *events])]))


def test_the_world_waits_for_its_slowest_rank() -> None:
    layout, reduced = Layout(pipeline=2, data=2), called("all_reduce", "world", 4, 8)
    roles = [role(section(takes(rank), *reduced), rank=2 * rank, ranks=2, pipeline=rank) for rank in range(2)]
    assert run(roles, layout).step_seconds == pytest.approx(1 + collective_seconds(CLUSTER, "all_reduce", 8, range(4)))


def test_ranks_on_another_chip_are_a_role_of_their_own() -> None:
    """32 devices, of which the last 16 are another chip: the second half of the only pipeline coordinate."""
    layout, cluster = Layout(data=4, tensor=8), load_cluster("mixed_h100_a100").for_world(32)
    reduced = called("all_reduce", "world", 32, 8)

    def seconds(rank: int, operator: Operator) -> float:
        return seconds_of(rank, operator) * (3 if cluster.part_of(rank).chip.name.startswith("A100") else 1)

    whole = role(section(takes(1), *reduced), ranks=32)
    fast, slow = replay([whole], layout, cluster, seconds).roles
    assert [(one.role.ranks, one.role.trace.rank, one.role.coordinates) for one in (fast, slow)] == [
        (16, 0, (range(2),)), (16, 16, (range(2, 4),))]  # fmt: skip
    assert (fast.busy_seconds, fast.imbalance_seconds, slow.busy_seconds) == pytest.approx((1, 2, 3))
    deep = Layout(pipeline=2, data=2, tensor=8)  # each half is a pipeline coordinate
    roles = [replace(whole, ranks=16, pipeline=rank, trace=replace(whole.trace, rank=16 * rank)) for rank in range(2)]
    assert len(replay(roles, deep, cluster, seconds).roles) == 2


def test_stragglers_slow_a_role_by_the_largest_of_its_ranks() -> None:
    def of(ranks: int) -> Replayed:
        return run([role(section(takes(10)), ranks=ranks)], Layout(data=ranks), deviation=0.01)

    assert of(1).step_seconds == pytest.approx(10)
    assert of(1024).step_seconds == pytest.approx(10 * (1 + 0.01 * 3.2489), rel=1e-5)
    (many,) = of(1024).roles
    assert (many.busy_seconds, many.straggler_seconds) == pytest.approx((10, 10 * 0.01 * 3.2489), rel=1e-3)


def test_memory_has_a_peak_at_a_moment() -> None:
    grows = section(Allocation(1, 50), takes(1), Allocation(1, 30), Free(1, 30), takes(1))
    shrinks = section(takes(1), Allocation(1, 40), takes(2), Free(1, 90), phase="backward")
    (result,) = run([role(grows, shrinks)], Layout()).roles
    trace = peak(result.role.trace)
    assert (
        (result.peak.bytes, dict(result.peak.by_kind))
        == (trace.bytes, trace.by_kind)
        == (190, {"parameters": 100, "activations": 90})
    )
    assert (result.peak.section is trace.section, result.peak.seconds) == (True, 3)
    held = [(moment.seconds, moment.bytes) for moment in result.memory()]
    assert held == [(0, 0), (0, 100), (0, 100), (1, 180), (2, 150), (3, 190)]


def test_spans_of_streams_are_given_on_request() -> None:
    layout, size = Layout(pipeline=2, tensor=2), 100 * MB
    reduced = called("all_reduce", "tensor", 2, size)
    (send, _), receive = called("send", "pipeline", 2, size, 1), called("receive", "pipeline", 2, size, 0)
    roles = [
        role(section(takes(1), takes(2), *reduced), section(send), ranks=2),
        role(section(*receive), section(takes(1)), rank=2, ranks=2, pipeline=1),
    ]
    assert not run(roles, layout).roles[0].spans
    first, second = run(roles, layout, spans="calls").roles
    assert [(span.stream, span.name) for span in first.spans] == [
        ("compute", ""), ("tensor", "all_reduce"), ("pipeline 0 -> 1", "send")]  # fmt: skip
    assert second.spans[0].call == first.spans[-1].call != first.spans[1].call
    assert (second.spans[0].start, second.spans[0].end) == (first.spans[-1].start, first.spans[-1].end)
    first, second = run(roles, layout, spans="operators").roles
    assert [span.name for span in first.spans] == ["takes 1", "takes 2", "all_reduce", "send"]


def waits_in_a_circle() -> list[Role]:
    """Each sends only after it has received."""
    others = ("pipeline_back", "pipeline"), ("pipeline", "pipeline_back")
    return [
        role(
            section(*called("receive", others[rank][0], 2, MB, 1 - rank), *called("send", others[rank][1], 2, MB, 1 - rank)),
            rank=rank,
            pipeline=rank,
        )
        for rank in range(2)
    ]


def other_calls() -> list[Role]:
    calls = called("all_reduce", "world", 2, MB), called("barrier", "world", 2)
    return [role(section(*events), rank=rank, pipeline=rank) for rank, events in enumerate(calls)]


@pytest.mark.parametrize(
    ("roles", "text"),
    [
        (waits_in_a_circle, "rank 0 waits for message number 1 in pipeline_back 1 -> 0, which rank 1 has not begun; rank 1 waits"),
        (other_calls, "rank 1 calls barrier as number 1 in world, but rank 0 calls all_reduce"),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_ranks_that_do_not_fit_together_are_named(roles: Any, text: str, plain: bool) -> None:
    with pytest.raises(CommunicationError, match=text):
        replay(roles(), Layout(pipeline=2), CLUSTER, seconds_of, plain=plain)


def test_roles_must_be_those_of_whole_pipelines() -> None:
    with pytest.raises(ValueError, match="coordinates 0 to 1"):
        replay([role(section(takes(1)))], Layout(pipeline=2), CLUSTER, seconds_of)
