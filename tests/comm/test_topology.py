"""The tiers that a group uses, against a count over every rank."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import LinkTier, as_range
from tests.comm.clusters import CHIP, NETWORK, NODE, mixed, single

POD = LinkTier("pod", 2e-6, 5e10, 32)


@st.composite
def ranges(draw: st.DrawFn, most: int = 200) -> range:
    start, stride = draw(st.integers(0, most)), draw(st.integers(1, 40))
    return range(start, start + stride * draw(st.integers(1, 40)), stride)


@given(ranges())
def test_domains_and_most_ranks_are_those_of_a_count_over_all_ranks(ranks: range) -> None:
    for level, size in zip(single(NODE, POD, NETWORK).levels(ranks), (8, 32, 10**9), strict=False):
        inside = [sum(rank // size == domain for rank in ranks) for domain in {rank // size for rank in ranks}]
        assert (level.domains, level.most) == (len(inside), max(inside))


@given(ranges(), st.integers(1, 60), st.integers(1, 60))
def test_a_mixed_cluster_counts_the_domains_of_every_part(ranks: range, first: int, second: int) -> None:
    devices = 8 * first + 4 * second
    cluster = mixed(8 * first, 4 * second, LinkTier("joint", 9e-6, 1e9))
    own = range(ranks[0] % devices, min(ranks[-1] + 1, devices), ranks.step)
    if not own:
        return
    nodes = [(0, rank // 8) if rank < 8 * first else (1, (rank - 8 * first) // 4) for rank in own]
    levels = cluster.levels(own)
    assert (levels[0].domains, levels[0].most) == (len(set(nodes)), max(map(nodes.count, nodes)))
    assert levels[-1].domains == 1
    assert (levels[-1].name == "joint") == (len({part for part, _ in nodes}) == 2)


def test_levels_end_with_the_first_tier_that_holds_the_whole_group() -> None:
    cluster = single(NODE, POD, NETWORK)
    assert [level.name for level in cluster.levels(range(8, 16))] == ["node"]
    assert [level.name for level in cluster.levels(range(7, 9))] == ["node", "pod"]
    assert [level.name for level in cluster.levels(range(0, 64, 32))] == ["node", "pod", "network"]


def test_a_device_that_is_not_there_is_refused() -> None:
    two = mixed(16, 16, LinkTier("joint", 9e-6, 1e9))
    assert two.part_of(31) is two.parts[1]
    with pytest.raises(ValueError, match="devices 0 to 31, not 32"):
        two.part_of(32)


def test_the_levels_of_a_large_group_are_computed_without_listing_it() -> None:
    """Listing so many ranks would not end."""
    many = 10**15
    levels = single(NODE, POD, NETWORK).levels(range(0, 8 * many, 8))
    assert [(level.domains, level.most) for level in levels] == [(many, 1), (many // 4, 4), (1, many)]
    assert [level.below for level in levels] == [1, 8, 32]


def test_as_range_takes_groups_of_a_layout_and_refuses_others() -> None:
    assert as_range((3, 7, 11)) == range(3, 12, 4)
    assert as_range((11, 3, 7)) == range(3, 12, 4)
    assert as_range(range(9, 2, -3)) == range(3, 10, 3)
    assert as_range((5,)) == range(5, 6)
    for ranks in ((0, 1, 3), (0, 0), ()):
        with pytest.raises(ValueError, match="constant stride"):
            as_range(ranks)


def test_a_world_takes_devices_of_each_part_in_proportion() -> None:
    assert single(NODE, NETWORK).for_world(1000).devices == 1000
    with pytest.raises(RecipeError, match="world=65: cluster=test has 64 devices; give world=64 or less"):
        single(NODE, NETWORK, devices=64).for_world(65)
    with pytest.raises(RecipeError, match="world=0 must be at least 1"):
        single(NODE, NETWORK).for_world(0)
    two = mixed(64, 32, LinkTier("joint", 9e-6, 1e9))
    assert [part.devices for part in two.for_world(24).parts] == [16, 8]
    with pytest.raises(RecipeError, match=r"multiple of 12, e\.g\. world=24"):
        two.for_world(30)


@pytest.mark.parametrize(("world", "used"), [(256, 64), (576, 72), (64, 72), (100, 72), (72 * 10 + 5, 72)])
def test_of_large_domains_a_job_takes_as_many_devices_of_each(world: int, used: int) -> None:
    rack = replace(NODE, devices=72)
    assert single(rack, NETWORK).for_world(world).parts[0].tiers[0].devices == used


def test_a_cluster_with_too_few_domains_for_that_is_filled() -> None:
    rack = replace(NODE, devices=72)
    assert single(rack, NETWORK, devices=288).for_world(256).parts[0].tiers[0].devices == 64
    assert single(rack, NETWORK, devices=260).for_world(256).parts[0].tiers[0].devices == 72


def test_nodes_of_a_few_devices_are_filled() -> None:
    assert single(NODE, NETWORK).for_world(14).parts[0].tiers[0].devices == NODE.devices == 8


def test_a_group_of_several_chips_has_the_slowest_figures_of_its_parts() -> None:
    joint = LinkTier("joint", 9e-6, 1e9, oversubscription=4.0)
    two = mixed(16, 16, joint)
    slow = replace(NODE, devices=4, latency_seconds=7e-6, bytes_per_second=2e10)
    two = replace(two, parts=(two.parts[0], replace(two.parts[1], tiers=(slow, NETWORK))))
    node, network, across = two.levels(range(32))
    assert (node.latency_seconds, node.bytes_per_second, node.uplink_bytes_per_second) == (7e-6, 2e10, 2e10)
    assert (network.latency_seconds, network.below) == (5e-6, 4)
    assert (across.latency_seconds, across.below, across.uplink_bytes_per_second) == (9e-6, 16, 16 * 1e9 / 4)
    assert two.levels(range(8))[0].latency_seconds == 1e-6


def test_every_chip_of_a_mixed_cluster_is_found_by_its_rank() -> None:
    two = mixed(16, 8, LinkTier("joint", 9e-6, 1e9))
    names = [two.part_of(rank).chip.name for rank in range(24)]
    assert names == ["chip"] * 16 + ["other"] * 8
    assert [a != b for a, b in pairwise(names)].count(True) == 1


def test_an_unknown_dtype_is_refused_with_those_that_are_known() -> None:
    assert CHIP.peak("bfloat16") == 1e14
    with pytest.raises(RecipeError, match=r"train\.dtype=float8: no matmul peak is known for chip; give one of bfloat16"):
        CHIP.peak("float8")
