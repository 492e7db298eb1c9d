"""The enumeration of layouts: complete where degrees divide, nothing that does not divide, what the user gives is kept."""

from dataclasses import replace
from math import prod

import pytest

from bagualu.parallel.pipeline.registry import placement_of
from bagualu.parallel.planner.layouts import (
    MOST_TOKENS,
    Degrees,
    PlannedLayout,
    SearchSpace,
    degrees,
    evened,
    heavier,
    layouts,
    leanest,
    neighbours,
    without_sequence,
)

DENSE = SearchSpace(
    world=16, layers=8, widths=(8, 4, 96), experts=0, global_batch=32, sequence_length=64, most_tensor=8, zero_stages=(0, 1, 2, 3)
)
MIXTURE = replace(DENSE, experts=8)


def all_of(space):
    return [layout for of in degrees(space) for layout in layouts(space, of)]


def test_degrees_are_all_that_divide():
    found = {(of.data, of.tensor, of.pipeline) for of in degrees(DENSE)}
    expected = {
        (16 // (tensor * pipeline), tensor, pipeline)
        for tensor in (1, 2, 4)  # 8 does not divide the 4 heads of keys and values
        for pipeline in (1, 2, 4, 8)  # 16 would be more than the 8 layers
        if 16 % (tensor * pipeline) == 0
    }
    assert found == expected


def test_tensor_ranks_share_a_domain_of_the_innermost_tier():
    assert {of.tensor for of in degrees(replace(DENSE, most_tensor=2))} == {1, 2}
    # groups of 4 neighbours would lie across domains of 6
    assert {of.tensor for of in degrees(replace(DENSE, world=24, global_batch=24, most_tensor=6))} == {1, 2}


def test_experts_are_divided_among_data_ranks():
    assert {of.expert for of in degrees(DENSE)} == {1}
    for of in degrees(MIXTURE):
        assert of.data % of.expert == 0
        assert 8 % of.expert == 0
    assert {of.expert for of in degrees(MIXTURE)} == {1, 2, 4, 8}


def test_micro_batches_divide_and_are_not_larger_than_helps():
    for of in degrees(DENSE):
        assert DENSE.global_batch % (of.data * of.micro_batch) == 0
    long = replace(DENSE, sequence_length=MOST_TOKENS // 2)
    assert {of.micro_batch for of in degrees(long)} == {1, 2}
    assert {of.micro_batch for of in degrees(replace(long, sequence_length=2 * MOST_TOKENS))} == {1}


def test_sequence_parallelism_needs_tensor_ranks_and_a_length_that_divides():
    assert all(of.sequence == (of.tensor > 1) for of in degrees(DENSE))
    assert not any(of.sequence for of in degrees(replace(DENSE, sequence_length=63)))


def test_what_sequence_parallelism_is_worth_is_seen_from_layouts_without_it():
    both = list(degrees(DENSE, plain=True))
    assert {(of.tensor > 1, of.sequence) for of in both} == {(False, False), (True, False), (True, True)}
    assert len(both) == len(set(both))
    (other,) = without_sequence(DENSE, PlannedLayout(Degrees(4, 2, 2, 1, 1, True), "1f1b", None, "none", 1))
    assert not other.degrees.sequence
    kept = replace(DENSE, fixed={"parallel.sequence": True})
    assert all(of.sequence for of in degrees(kept, plain=True))
    assert not list(without_sequence(kept, replace(other, degrees=Degrees(4, 2, 2, 1, 1, True))))


def test_what_recomputes_more_is_considered_for_a_layout_that_recomputes_least():
    layout = PlannedLayout(Degrees(4, 2, 2, 1, 1, True), "1f1b", None, "none", 1)
    assert [one.recompute for one in heavier(DENSE, layout)] == ["attention", "every:4", "every:2", "full"]
    assert not list(heavier(DENSE, replace(layout, recompute="attention")))
    assert not list(heavier(replace(DENSE, fixed={"train.recompute": "full"}), replace(layout, recompute="full")))


def test_layouts_have_every_schedule_recomputation_and_zero_stage_once():
    found = all_of(DENSE)
    assert len(found) == len(set(found))
    assert {layout.schedule for layout in found if layout.degrees.pipeline == 1} == {"1f1b"}
    several = {layout.schedule for layout in found if layout.degrees.pipeline == 4}
    assert several == {"1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "v_half", "dualpipe_v"}
    assert {layout.recompute for layout in found} == {"none", "attention", "every:4", "every:2", "full"}
    assert {layout.zero for layout in found if layout.degrees.data > 1} == {1, 2, 3}
    assert len({layout.zero for layout in found if layout.degrees.data == 1}) == 1
    assert "experts" in {layout.recompute for layout in all_of(MIXTURE)}


def test_stages_are_no_more_than_layers_and_even_where_they_can_be():
    found = all_of(DENSE)
    for layout in found:
        assert placement_of(layout.schedule, layout.degrees.pipeline, layout.virtual_stages).stages <= DENSE.layers
    assert {layout.virtual_stages for layout in found if layout.degrees.pipeline == 2} >= {2, 4}
    uneven = [layout.virtual_stages for layout in all_of(replace(DENSE, layers=9)) if layout.degrees.pipeline == 2]
    assert {2, 4} <= set(uneven)


def test_engines_without_split_backward_passes_get_only_schedules_with_whole_ones():
    found = {layout.schedule for layout in all_of(replace(DENSE, whole_backward=True))}
    assert found == {"1f1b", "interleaved_1f1b"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parallel.tensor", 2),
        ("parallel.pipeline", 4),
        ("parallel.data", 4),
        ("parallel.schedule", "gpipe"),
        ("parallel.zero", 0),
        ("train.micro_batch", 2),
        ("train.recompute", "every:3"),
        ("parallel.sequence", True),
        ("parallel.balance", (1, 3, 3, 1)),
    ],
)
def test_what_the_user_gives_is_kept(key, value):
    found = all_of(replace(DENSE, fixed={key: value}))
    assert found
    plain = list(value) if isinstance(value, tuple) else value
    assert {str(layout.values()[key]) for layout in found} == {str(plain)}
    others = {"parallel.tensor", "train.micro_batch", "train.recompute"} - {key}
    for other in others - ({"parallel.tensor"} if key == "parallel.sequence" else set()):
        assert len({str(layout.values()[other]) for layout in found}) > 1, other


def test_a_value_that_divides_nothing_leaves_no_layout():
    assert all_of(replace(DENSE, fixed={"parallel.tensor": 3})) == []
    assert all_of(replace(DENSE, world=13)) == []


def test_the_leanest_layouts_recompute_everything_and_divide_most():
    found = list(leanest(MIXTURE))
    assert {layout.recompute for layout in found} == {"full"}
    assert all(layout.zero == 3 or layout.degrees.data == 1 for layout in found)
    assert {layout.degrees.micro_batch for layout in found} == {1}
    assert all(layout.degrees.sequence or layout.degrees.tensor == 1 for layout in found)
    divisions = {(of.data, of.tensor, of.pipeline, of.expert) for of in degrees(MIXTURE)}
    assert {(one.degrees.data, one.degrees.tensor, one.degrees.pipeline, one.degrees.expert) for one in found} == divisions


def test_all_ranks_are_used():
    for of in degrees(MIXTURE):
        assert prod((of.data, of.tensor, of.pipeline)) == MIXTURE.world


def test_neighbours_differ_in_one_choice():
    layout = PlannedLayout(Degrees(4, 2, 2, 2, 2, True), "zb_h1", None, "full", 2)
    found = list(neighbours(MIXTURE, layout))
    assert set(found) < {other for of in degrees(MIXTURE, plain=True) for other in layouts(MIXTURE, of)}
    values = layout.values()
    implied = {"parallel.data", "parallel.virtual_stages"}
    seen = {}
    for other in found:
        keys = {key for key, value in other.values().items() if value != values[key]} - implied
        if other.degrees.tensor == 1:
            keys -= {"parallel.sequence"}
        if other.degrees.pipeline == 1:
            keys -= {"parallel.schedule"}
        (key,) = keys
        seen.setdefault(key, set()).add(other.values()[key])
    assert seen == {
        "parallel.tensor": {1, 4}, "parallel.pipeline": {1, 4}, "parallel.expert": {1, 4}, "train.micro_batch": {1, 4, 8},
        "parallel.sequence": {False}, "parallel.zero": {1, 3},
        "train.recompute": {"none", "attention", "experts", "every:4", "every:2"},
        "parallel.schedule": {"1f1b", "interleaved_1f1b", "zb_v", "v_half", "dualpipe_v"},
    }  # fmt: skip


def test_the_stages_of_a_rank_get_equally_many_layers():
    assert evened((5, 3, 5, 19), placement_of("zb_v", 2)) == (12, 4, 4, 12)
    assert evened((1, 4, 6, 5), placement_of("interleaved_1f1b", 2, 2)) == (4, 5, 3, 4)
    assert evened((5, 3), placement_of("1f1b", 2)) == (5, 3)


def test_neighbours_keep_an_uneven_split_where_it_applies():
    layout = PlannedLayout(Degrees(4, 2, 2, 1, 2, True), "1f1b", None, "full", 1, balance=(5, 3))
    found = list(neighbours(DENSE, layout))
    for other in found:
        same = other.degrees.pipeline == 2 and other.schedule == "1f1b"
        assert other.balance == ((5, 3) if same else "uniform")
