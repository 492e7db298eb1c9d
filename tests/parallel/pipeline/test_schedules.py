"""Schedules as lists and as the pictures of the docstrings."""

import textwrap
from types import ModuleType

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.draw_text import draw, short
from bagualu.parallel.pipeline.registry import FAMILIES, SCHEDULES, compute_schedule, placement_of
from bagualu.parallel.pipeline.schedules import dualpipe_v, interleaved, one_stage, v_half, zb_v
from bagualu.parallel.pipeline.schedules.schedule import Action, Kind, Schedule, forward_only, with_messages
from bagualu.parallel.pipeline.timeline import per_kind, simulate


def spelled(schedule: Schedule, rank: int) -> str:
    return " ".join(short(action, schedule) for action in schedule.actions[rank])


@pytest.mark.parametrize(
    ("where", "name", "ranks", "micro_batches"),
    [
        (one_stage, "gpipe", 4, 4),
        (one_stage, "1f1b", 4, 4),
        (one_stage, "zb_h1", 4, 6),
        (interleaved, "interleaved_1f1b", 2, 4),
        (zb_v, "zb_v", 3, 5),
        (v_half, "v_half", 3, 4),
        (dualpipe_v, "dualpipe_v", 2, 5),
    ],
)
def test_the_docstring_shows_what_is_drawn(where: ModuleType, name: str, ranks: int, micro_batches: int) -> None:
    picture = draw(compute_schedule(name, ranks, micro_batches))
    assert textwrap.indent(picture, "    ") + "\n" in (where.__doc__ or ""), picture


@pytest.mark.parametrize(
    ("name", "rank", "actions"),
    [
        ("gpipe", 0, "F0 F1 F2 F3 F4 B0 B1 B2 B3 B4"),
        ("gpipe", 2, "F0 F1 F2 F3 F4 B0 B1 B2 B3 B4"),
        ("1f1b", 0, "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4"),
        ("1f1b", 1, "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4"),
        ("1f1b", 2, "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4"),
        ("zb_h1", 0, "F0 F1 F2 I0 W0 F3 I1 W1 F4 I2 W2 I3 W3 I4 W4"),
        ("zb_h1", 2, "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 F4 I4 W2 W3 W4"),
        ("zb_v", 2, "F0 F0' F1 F1' F2 F2' I0' W0' F3 I0 W0 F3' I1' W1' F4 I1 W1 F4' I2' W2' I2 I3' I3 I4' I4 W2 W3' W4' W3 W4"),
    ],
)
def test_three_ranks_and_five_micro_batches(name: str, rank: int, actions: str) -> None:
    assert spelled(compute_schedule(name, 3, 5), rank) == actions


def test_fewer_micro_batches_than_ranks() -> None:
    assert [spelled(compute_schedule("1f1b", 3, 1), rank) for rank in range(3)] == ["F0 B0"] * 3
    assert [spelled(compute_schedule("1f1b", 4, 2), rank) for rank in range(4)] == ["F0 F1 B0 B1"] * 3 + ["F0 B0 F1 B1"]
    assert [spelled(compute_schedule("dualpipe_v", 2, 1), rank) for rank in range(2)] == ["F0 F0' I0' W0' B0", "F0 F0' B0' B0"]
    assert spelled(compute_schedule("interleaved_1f1b", 3, 2), 0) == "F0 F1 F0' F1' B0' B1' B0 B1"


def test_micro_batches_that_are_no_multiple_of_the_ranks_make_larger_groups_first() -> None:
    assert spelled(compute_schedule("interleaved_1f1b", 2, 5), 0).replace(" B", " .B").split(" .")[0] == "F0 F1 F2 F0' F1' F2'"
    forward = [one for one in spelled(compute_schedule("interleaved_1f1b", 2, 5), 0).split() if one[0] == "F"]
    assert " ".join(forward) == "F0 F1 F2 F0' F1' F2' F3 F4 F3' F4'"


def test_one_rank_holds_every_chunk_and_sends_nothing() -> None:
    for name in SCHEDULES:
        schedule = compute_schedule(name, 1, 3)
        assert with_messages(schedule) == schedule
        assert simulate(schedule, per_kind(1, 1, 1)).bubble == 0, name
    assert spelled(compute_schedule("1f1b", 1, 3), 0) == "F0 B0 F1 B1 F2 B2"
    assert spelled(compute_schedule("interleaved_1f1b", 1, 2), 0) == "F0 F0' B0' F1 B0 F1' B1' B1"


def test_only_schedules_that_say_so_split_the_backward_pass() -> None:
    for name, family in FAMILIES.items():
        kinds = {action.kind for actions in compute_schedule(name, 2, 4).actions for action in actions}
        assert (Kind.WEIGHT_GRADIENT in kinds) == family.splits_backward, name


def test_messages_stand_right_beside_the_passes_that_need_and_feed_them() -> None:
    first, middle, last = ([str(a) for a in mine] for mine in with_messages(compute_schedule("1f1b", 3, 2)).actions)
    assert [a.split()[0] for a in first] == ["F0", "SA0", "F1", "SA1", "RG0", "B0", "RG1", "B1"]
    assert [a.split()[0] for a in middle] == ["RA0", "F0", "SA0", "RA1", "F1", "SA1", "RG0", "B0", "SG0", "RG1", "B1", "SG1"]
    assert [a.split()[0] for a in last] == ["RA0", "F0", "B0", "SG0", "RA1", "F1", "B1", "SG1"]


def test_stages_of_one_rank_hand_on_without_a_message() -> None:
    schedule = with_messages(compute_schedule("zb_v", 2, 1))
    assert spelled(schedule, 1) == "RA0 F0 F0' SA0' RG0' I0' W0' I0 SG0 W0"


def test_validation_goes_forward_only_chunk_after_chunk() -> None:
    schedule = with_messages(forward_only(StagePlacement(2, 2, v_shaped=True), 2))
    assert spelled(schedule, 0) == "F0 SA0 F1 SA1 RA0' F0' RA1' F1'"
    assert spelled(schedule, 1) == "RA0 F0 RA1 F1 F0' SA0' F1' SA1'"


def test_where_the_stages_lie() -> None:
    assert [placement_of("interleaved_1f1b", 3).rank_of(stage) for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [placement_of("zb_v", 3).rank_of(stage) for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    assert placement_of("interleaved_1f1b", 2, 3).stages == 6


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"parallel.schedule=zigzag is unknown; give one of gpipe, 1f1b"):
        compute_schedule("zigzag", 2, 2)


@pytest.mark.parametrize(
    ("name", "chunks", "fix"),
    [("1f1b", 2, 1), ("interleaved_1f1b", 1, 2), ("zb_h1", 3, 1), ("zb_v", 3, 2), ("v_half", 1, 2), ("dualpipe_v", 4, 2)],
)
def test_chunks_that_a_schedule_cannot_take_are_refused_with_those_it_can(name: str, chunks: int, fix: int) -> None:
    message = f"parallel.virtual_stages={chunks} does not go with parallel.schedule={name}; give parallel.virtual_stages={fix}"
    with pytest.raises(RecipeError, match=message):
        compute_schedule(name, 2, 4, chunks)


def test_a_pass_begins_when_its_rank_is_free_and_its_input_there() -> None:
    first, second = simulate(compute_schedule("1f1b", 2, 2), per_kind(1, 3)).ranks
    assert [(str(span.action), span.start) for span in first] == [
        ("F0 of stage 0", 0), ("F1 of stage 0", 1), ("B0 of stage 0", 5), ("B1 of stage 0", 9),
    ]  # fmt: skip
    assert [span.start for span in second] == [1, 2, 5, 6]


def test_a_message_takes_its_time_between_ranks_and_none_within_one() -> None:
    first, second = simulate(compute_schedule("zb_v", 2, 1), per_kind(1, 1, 1), message=5).ranks
    assert [(span.action.kind, span.start) for span in second][:3] == [("F", 6), ("F", 7), ("I", 20)]
    assert [span.start for span in first][:3] == [0, 13, 14]


def test_passes_that_wait_for_each_other_have_no_times() -> None:
    wrong = [[Action(Kind.BACKWARD, 0, 0), Action(Kind.FORWARD, 0, 0)], [Action(Kind.FORWARD, 0, 1), Action(Kind.BACKWARD, 0, 1)]]
    with pytest.raises(ValueError, match="wait for each other"):
        simulate(Schedule(StagePlacement(2), 1, wrong), per_kind(1, 1))
