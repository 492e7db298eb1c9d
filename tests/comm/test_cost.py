"""Costs of collectives: exact on one tier, never faster than the links, and in the order that the algorithms promise."""

import re
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.cost import KINDS, collective_cost, collective_seconds
from bagualu.comm.topology import Cluster, LinkTier
from tests.comm.clusters import NETWORK, NODE, mixed, single

SIZES = st.just(0.0) | st.floats(1, 1e12)
ALL = [(kind, algorithm) for kind, algorithms in KINDS.items() for algorithm in algorithms]
COLLECTIVES = [pair for pair in ALL if pair[0] != "p2p"]


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Clusters of two or three tiers, each no faster than the tier below it and no less oversubscribed."""
    node, pods = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from([2, 8]))
    bandwidths = sorted((draw(st.floats(1e9, 1e12)) for _ in range(3)), reverse=True)
    latencies = sorted(draw(st.floats(1e-7, 1e-4)) for _ in range(3))
    over = [1.0, *sorted(draw(st.sampled_from([1.0, 2.0, 16 / 3])) for _ in range(2))]
    sizes = draw(st.sampled_from([(node, None), (node, node * pods, None)]))
    return single(*(LinkTier(f"tier {i}", latencies[i], bandwidths[i], size, over[i]) for i, size in enumerate(sizes)))


@st.composite
def groups_of_ranks(draw: st.DrawFn) -> range:
    stride, count = draw(st.sampled_from([1, 2, 4, 8, 64])), draw(st.sampled_from([2, 4, 8, 16, 64]))
    start = draw(st.integers(0, stride - 1)) + stride * count * draw(st.integers(0, 3))
    return range(start, start + stride * count, stride)


@pytest.mark.parametrize("n", [2, 3, 8, 1000])
@pytest.mark.parametrize(("kind", "passes"), [("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1)])
def test_a_ring_on_one_tier_takes_its_textbook_time(kind: str, passes: int, n: int) -> None:
    cost = collective_cost(single(LinkTier("all", 3e-6, 2.5e10)), kind, 1e9, range(n), "ring")
    assert cost.transfer_seconds == pytest.approx(passes * (n - 1) / n * 1e9 / 2.5e10, rel=1e-12)
    assert cost.latency_seconds == pytest.approx(passes * (n - 1) * 3e-6, rel=1e-12)


def test_the_other_collectives_on_one_tier_take_their_textbook_time() -> None:
    cluster = single(LinkTier("all", 3e-6, 2.5e10), start_seconds=1e-3)
    assert collective_seconds(cluster, "p2p", 1e9, (0, 9)) == pytest.approx(1e-3 + 3e-6 + 0.04)
    assert collective_seconds(cluster, "p2p", 1e9, (9, 0)) == collective_seconds(cluster, "p2p", 1e9, (0, 9))
    assert collective_seconds(cluster, "all_to_all", 1e9, range(8)) == pytest.approx(1e-3 + 7 * 3e-6 + 7 / 8 * 0.04)
    assert collective_cost(cluster, "broadcast", 1e9, range(8), "ring").seconds == pytest.approx(1e-3 + 7 * 3e-6 + 0.04)
    assert collective_cost(cluster, "all_reduce", 1e9, range(8), "tree").transfer_seconds == pytest.approx(2 * 0.04)
    assert collective_seconds(cluster, "all_reduce", 1e9, range(1)) == 0


@pytest.mark.parametrize("algorithm", ["ring", "rings", "hierarchical"])
def test_a_reduction_over_two_tiers_takes_the_time_of_its_formula(algorithm: str) -> None:
    """4 nodes of 8: hops and domains by hand, with the links of a node's 8 devices side by side but for the single ring."""
    cost = collective_cost(single(NODE, NETWORK), "all_reduce", 8e9, range(32), algorithm)
    transfer = {
        "ring": 2 * 31 / 32 * 8e9 / 1e10,
        "rings": 2 * 31 / 32 * 8e9 / 8e10,
        "hierarchical": 2 * (7 / 8 * 8e9 / 1e11 + 3 / 4 * 1e9 / 1e10),
    }[algorithm]
    latency = 2 * (7 * 1e-6 + 3 * 5e-6) if algorithm == "hierarchical" else 2 * (28 * 1e-6 + 3 * 5e-6)
    assert cost.latency_seconds == pytest.approx(latency)
    assert cost.transfer_seconds == pytest.approx(transfer)


def test_an_all_to_all_over_two_tiers_takes_the_time_of_its_formula() -> None:
    """4 nodes of 8: 7 partners in the node and 24 outside, or 7 and then 3 with the bytes for 8."""
    pairwise, phases = (
        collective_cost(single(NODE, NETWORK), "all_to_all", 3.2e9, range(32), name) for name in ("pairwise", "hierarchical")
    )
    assert pairwise.latency_seconds == pytest.approx(7 * 1e-6 + 24 * 5e-6)
    assert pairwise.transfer_seconds == pytest.approx(7e8 / 1e11 + 24e8 / 1e10)
    assert phases.latency_seconds == pytest.approx(7 * 1e-6 + 3 * 5e-6)
    assert phases.transfer_seconds == pytest.approx(28e8 / 1e11 + 24e8 / 1e10)


def test_a_tree_has_a_chain_in_the_node_and_a_binary_tree_above() -> None:
    cost = collective_cost(single(NODE, NETWORK), "all_reduce", 8e9, range(8 * 1024), "tree")
    assert cost.latency_seconds == pytest.approx(2 * (7 * 1e-6 + 10 * 5e-6))
    assert cost.transfer_seconds == pytest.approx(2 * 8e9 / 8e10)


@given(clusters(), groups_of_ranks(), st.sampled_from(COLLECTIVES), st.sampled_from([None, 1, 2]), st.integers(1, 3), SIZES)
def test_nothing_is_faster_than_the_links(
    cluster: Cluster, ranks: range, collective: tuple[str, str], groups: int | None, sharers: int, size: float
) -> None:
    """The bytes that must leave a domain for the others need at least their time on all the links that lead out of it."""
    kind, algorithm = collective
    cost = collective_cost(cluster, kind, size, ranks, algorithm, groups, sharers)
    inner = 1
    for level in cluster.levels(ranks):
        domains = len(ranks) / inner  # of the tier below
        if domains > 1:
            out = min(inner * level.bytes_per_second, level.uplink_bytes_per_second)
            must = {"all_reduce": 2 * (domains - 1) / domains, "all_gather": (domains - 1) / domains, "broadcast": 1.0}
            must |= {"reduce_scatter": must["all_gather"], "all_to_all": inner * (domains - 1) / domains}
            assert cost.transfer_seconds >= must[kind] * size / out * sharers * (1 - 1e-9)
        inner = level.most


@given(clusters(), groups_of_ranks(), st.sampled_from(COLLECTIVES), SIZES, SIZES)
def test_more_bytes_never_take_less_time(
    cluster: Cluster, ranks: range, collective: tuple[str, str], one: float, other: float
) -> None:
    kind, algorithm = collective
    for chosen in (algorithm, None):
        small, large = (collective_cost(cluster, kind, size, ranks, chosen).seconds for size in sorted((one, other)))
        assert small <= large


@given(clusters(), groups_of_ranks(), st.sampled_from(COLLECTIVES), SIZES)
def test_contention_never_makes_a_collective_faster(
    cluster: Cluster, ranks: range, collective: tuple[str, str], size: float
) -> None:
    kind, algorithm = collective
    alone, two, all_busy = (collective_cost(cluster, kind, size, ranks, algorithm, groups).seconds for groups in (1, 2, None))
    assert alone <= two * (1 + 1e-9)
    assert two <= all_busy * (1 + 1e-9) or groups_exceed(cluster, ranks)
    assert all_busy <= collective_cost(cluster, kind, size, ranks, algorithm, None, sharers=2).seconds


def groups_exceed(cluster: Cluster, ranks: range) -> bool:
    """Whether a second such group does not fit into some domain, so that two at once are more than all."""
    levels = cluster.levels(ranks)
    return any(level.below < 2 * inner for level, inner in zip(levels, [1, *(level.most for level in levels)], strict=False))


@given(clusters(), st.integers(1, 6), st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]), SIZES)
def test_hierarchical_is_no_slower_than_one_flat_ring_on_two_tiers(cluster: Cluster, nodes: int, kind: str, size: float) -> None:
    """Without oversubscription, where a flat ring does not use the links that others leave idle."""
    part = cluster.parts[0]
    node, network = part.tiers[0], replace(part.tiers[-1], oversubscription=1.0)
    ranks = range((node.devices or 1) * nodes)
    flat, hierarchical = (collective_cost(single(node, network), kind, size, ranks, name) for name in ("ring", "hierarchical"))
    assert hierarchical.seconds <= flat.seconds * (1 + 1e-9)


@given(clusters(), groups_of_ranks(), st.sampled_from([*KINDS]), SIZES)
def test_the_cheapest_algorithm_of_the_library_is_chosen(cluster: Cluster, ranks: range, kind: str, size: float) -> None:
    ranks = ranks[:2] if kind == "p2p" else ranks
    every = {name: collective_cost(cluster, kind, size, ranks, name) for name in KINDS[kind]}
    best = collective_cost(cluster, kind, size, ranks)
    assert best == min(every.values(), key=lambda cost: cost.seconds)
    only = replace(cluster, algorithms=("ring",))
    assert collective_cost(only, kind, size, ranks).algorithm in ("ring", "pairwise", "direct")


def test_links_between_pairs_of_devices_add_up_only_for_all_of_them() -> None:
    """Each of 8 devices has 7 links of 10 GB/s: two devices use one of them, eight all."""
    mesh = single(LinkTier("node", 1e-6, 7e10, 8, peer_bytes_per_second=1e10), NETWORK)
    assert collective_cost(mesh, "all_reduce", 8e9, range(2)).transfer_seconds == pytest.approx(8e9 / 1e10)
    assert collective_cost(mesh, "all_reduce", 8e9, range(8)).transfer_seconds == pytest.approx(2 * 7 / 8 * 8e9 / 7e10)
    assert collective_cost(mesh, "all_reduce", 8e9, range(8), "ring").transfer_seconds == pytest.approx(2 * 7 / 8 * 8e9 / 1e10)
    assert collective_cost(mesh, "p2p", 8e9, (0, 7)).transfer_seconds == pytest.approx(0.8)


def test_what_crosses_a_tier_passes_the_links_of_the_tiers_below_it() -> None:
    """The 2 devices of a node have uplinks of 2 x 10 GB/s / 4 together, although the 8 of a pod have 8 x 10 GB/s / 4."""
    pod = LinkTier("pod", 2e-6, 1e10, 8, oversubscription=4.0)
    cluster = single(replace(NODE, devices=2), pod, replace(NETWORK, oversubscription=4.0))
    assert collective_cost(cluster, "p2p", 1e9, (0, 8), groups=1).transfer_seconds == pytest.approx(1e9 / 5e9)
    assert collective_cost(cluster, "all_gather", 1e9, (0, 8), "rings", groups=1).transfer_seconds == pytest.approx(0.5e9 / 5e9)


def test_a_message_crosses_to_another_chip_at_the_speed_of_the_joint() -> None:
    cluster = mixed(16, 16, LinkTier("joint", 9e-6, 1e9))
    assert collective_seconds(cluster, "p2p", 1e9, (15, 16), groups=1) == pytest.approx(9e-6 + 1)
    assert collective_seconds(cluster, "p2p", 1e9, (8, 15)) == pytest.approx(1e-6 + 0.01)
    inside, across = (collective_seconds(cluster, "all_reduce", 1e9, range(16 * parts)) for parts in (1, 2))
    assert across > inside


def test_a_supernode_of_sunway_sends_out_three_sixteenths_of_what_it_sends_inside() -> None:
    """All 256 nodes of each supernode send at once; one group alone has its whole link."""
    sunway = load_cluster("sw26010pro")
    inside = collective_cost(sunway, "p2p", 1e9, (0, 255)).transfer_seconds
    outside = collective_cost(sunway, "p2p", 1e9, (0, 256)).transfer_seconds
    assert outside / inside == pytest.approx(16 / 3)
    assert collective_cost(sunway, "p2p", 1e9, (0, 256), groups=1).transfer_seconds == pytest.approx(inside)
    forty_eight, forty_nine = (collective_cost(sunway, "p2p", 1e9, (0, 256), groups=n).transfer_seconds for n in (48, 49))
    assert forty_eight == pytest.approx(inside)
    assert forty_nine > inside * 1.01


def test_a_group_costs_nothing_to_compute_however_many_ranks_it_has() -> None:
    """Anything in proportion to so many ranks would not end."""
    many = 10**15
    for kind in KINDS:
        ranks = range(0, 8 * many + 1, 8 * many) if kind == "p2p" else range(0, 8 * many, 8)
        assert collective_seconds(single(NODE, NETWORK), kind, 1e9, ranks) > 0


def test_experts_inside_supernodes_are_cheaper_than_across_them() -> None:
    """BaGuaLu's MoDa layout: the all_to_all on the fast dimension, and in two phases where it crosses supernodes."""
    sunway = load_cluster("sw26010pro").for_world(96000)
    near, far = range(256), range(0, 96000, 375)
    assert len(near) == len(far)
    assert collective_seconds(sunway, "all_to_all", 1e8, near) * 4 < collective_seconds(sunway, "all_to_all", 1e8, far)
    everyone = collective_cost(sunway, "all_to_all", 1e8, range(96000))
    assert everyone.algorithm == "hierarchical"
    assert everyone.seconds * 5 < collective_cost(sunway, "all_to_all", 1e8, range(96000), "pairwise").seconds


MEASURED = (0.82, 1.67, 3.27, 6.71, 13.68, 22.82, 36.87, 61.23, 88.87, 125.65, 157.62, 198.01)
"""Size divided by time, in GB/s, of an all_reduce on 8 H200, for 32 KiB, 64 KiB, ... 64 MiB: stas00/ml-engineering,
network/benchmarks/results/all-reduce-8xH200.md. From 2 MiB on, NCCL reduced in the switch."""


def test_a_reduction_on_8_h200_takes_what_was_measured() -> None:
    h200 = load_cluster("h200")
    for doubling, gigabytes_per_second in enumerate(MEASURED):
        size = 2**15 * 2**doubling
        assert collective_seconds(h200, "all_reduce", size, range(8)) == pytest.approx(size / gigabytes_per_second / 1e9, rel=0.2)
    without_the_switch = 2 * 7 / 8 * 2**34 / 367.61e9
    assert collective_seconds(h200, "all_reduce", 2**34, range(8)) == pytest.approx(without_the_switch, rel=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("scatter", 1.0, range(4)), "scatter is no collective; there are all_reduce"),
        (("all_gather", 1.0, range(4), "tree"), "all_gather has no algorithm tree; there are ring"),
        (("all_gather", -1.0, range(4)), "-1.0 bytes"),
        (("all_gather", 1.0, range(4), None, 0), "0 groups"),
        (("p2p", 1.0, range(3)), "between two ranks, not 3"),
        (("all_gather", 1.0, (0, 1, 3)), "constant stride"),
        (("all_gather", 1.0, range(0, 128, 4)), "devices 0 to 63, not 124"),
    ],
)
def test_calls_that_make_no_sense_are_refused(words: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        collective_cost(single(NODE, NETWORK, devices=64), *words)  # type: ignore[arg-type]


def test_costs_are_finite_for_every_collective_on_every_described_cluster() -> None:
    for name in ("a100", "h800", "gb200", "mi300x", "ascend910b", "sw26010pro", "mixed_h100_a100"):
        cluster = load_cluster(name)
        for kind in KINDS:
            ranks = (0, 300) if kind == "p2p" else range(512)
            assert 0 < collective_seconds(cluster, kind, 1e6, ranks) < inf
