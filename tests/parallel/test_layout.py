"""Rank arithmetic: every rank has its own coordinates, and every axis parts the world into groups that agree."""

import itertools
from dataclasses import replace
from math import prod

from hypothesis import given
from hypothesis import strategies as st

from bagualu.parallel.layout import COPIES, SHARD, Layout

AXES = ("pipeline", "data", "context", "tensor")
DERIVED = ("fold", "expert", "replica", "world")
SAME = {
    "pipeline": ("fold", "tensor"), "tensor": ("fold", "pipeline"), "data": ("context", "tensor", "pipeline"),
    "context": ("data", "tensor", "pipeline"), "fold": ("tensor", "pipeline"), "expert": ("replica", "tensor", "pipeline"),
    "replica": ("expert", "tensor", "pipeline"), "world": (),
}  # fmt: skip
"""What the members of a group have in common."""


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    pipeline, data, context, tensor = (draw(st.integers(1, 4)) for _ in range(4))
    fold = data * context
    return Layout(pipeline, data, context, tensor, draw(st.sampled_from([n for n in range(1, fold + 1) if fold % n == 0])))


@given(layouts())
def test_coordinates_are_a_bijection_within_the_degrees(layout: Layout) -> None:
    assert layout.world == prod(layout.size(axis) for axis in AXES)
    for axes in (AXES, ("pipeline", "fold", "tensor"), ("pipeline", "replica", "expert", "tensor")):
        places = [tuple(layout.coordinates(rank)[axis] for axis in axes) for rank in range(layout.world)]
        assert len(set(places)) == layout.world
        assert all(0 <= at < layout.size(axis) for place in places for at, axis in zip(place, axes, strict=True))
    for rank in range(layout.world):
        at = layout.coordinates(rank)
        assert layout.rank(at["pipeline"], at["fold"], at["tensor"]) == rank


@given(layouts())
def test_peers_part_the_world_and_share_all_other_coordinates(layout: Layout) -> None:
    for axis, same in SAME.items():
        groups = {rank: layout.peers(axis, rank) for rank in range(layout.world)}
        for rank, group in groups.items():
            assert len(group) == layout.size(axis)
            assert group[layout.coordinates(rank)[axis]] == rank
            assert all(groups[member] == group for member in group)
            assert all(layout.coordinates(member)[other] == layout.coordinates(rank)[other] for member in group for other in same)
            assert [layout.coordinates(member)[axis] for member in group] == list(range(len(group)))


@given(layouts())
def test_near_axes_have_near_ranks(layout: Layout) -> None:
    """A tensor group is contiguous; the experts of a group are neighbours in the fold, its replicas as far apart as can be."""
    for rank in range(layout.world):
        tensor = layout.peers("tensor", rank)
        assert tensor == range(tensor[0], tensor[0] + layout.tensor)
        folds = [layout.coordinates(member)["fold"] for member in layout.peers("expert", rank)]
        assert folds == list(range(folds[0], folds[0] + layout.expert))
        stages = layout.peers("pipeline", rank)
        assert all(b - a == layout.fold * layout.tensor for a, b in itertools.pairwise(stages))


def test_sixteen_ranks_by_hand() -> None:
    layout = Layout(pipeline=2, data=4, tensor=2, expert=2)
    assert layout.coordinates(13) == {
        "pipeline": 1, "data": 2, "context": 0, "tensor": 1, "fold": 2, "expert": 0, "replica": 1, "world": 13,
    }  # fmt: skip
    peers = {axis: list(layout.peers(axis, 13)) for axis in ("tensor", "data", "expert", "replica", "pipeline")}
    assert peers == {"tensor": [12, 13], "data": [9, 11, 13, 15], "expert": [13, 15], "replica": [9, 13], "pipeline": [5, 13]}


def test_a_layout_reads_as_the_axes_that_are_used() -> None:
    assert str(Layout(pipeline=2, data=4, expert=2)) == "data 4 x pipeline 2 x expert 2"
    assert str(Layout()) == "one rank"


@given(layouts())
def test_tiers_part_an_axis_into_neighbours_and_those_with_the_same_place_among_them(layout: Layout) -> None:
    """For every number of ranks that may share a copy of the weights; experts are shared by at most as many."""
    fits = [n for n in range(2, layout.fold + 1) if layout.fold % n == 0 and (n <= layout.expert or n % layout.expert == 0)]
    for shard in [None, *fits]:
        tiered = replace(layout, shard=shard)
        assert tiered.size("fold" + SHARD) == (shard or layout.fold)
        assert tiered.size("replica" + SHARD) * layout.expert <= max(layout.expert, tiered.size("fold" + SHARD))
        for whole, rank in itertools.product(("fold", "replica"), range(layout.world)):
            peers = layout.peers(whole, rank)
            together, copies = tiered.peers(whole + SHARD, rank), tiered.peers(whole + COPIES, rank)
            assert (len(together), len(copies)) == (tiered.size(whole + SHARD), tiered.size(whole + COPIES))
            assert set(together) & set(copies) == {rank}
            first = peers.index(together[0])
            assert peers[first : first + len(together)] == together, "neighbours"
            grid = {peer for one in together for peer in tiered.peers(whole + COPIES, one)}
            assert grid == set(peers)
            assert {tiered.peers(whole + SHARD, peer) for peer in together} == {together}
