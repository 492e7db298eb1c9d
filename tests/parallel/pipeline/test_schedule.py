"""Schedules as lists and as the pictures of the docstring."""

import textwrap

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.parallel.pipeline import schedule
from bagualu.parallel.pipeline.draw import draw, start_times
from bagualu.parallel.pipeline.schedule import Action, Kind, compute_schedule, forward_only, with_messages


def spelled(actions: list[Action]) -> str:
    return " ".join(map(str, actions))


def test_the_docstring_shows_what_is_drawn() -> None:
    for name in ("gpipe", "1f1b"):
        picture = draw(compute_schedule(name, 4, 4))
        assert textwrap.indent(picture, "    ") in (schedule.__doc__ or ""), picture


@pytest.mark.parametrize(
    ("name", "stage", "actions"),
    [
        ("gpipe", 0, "F0 F1 F2 F3 F4 B0 B1 B2 B3 B4"),
        ("gpipe", 2, "F0 F1 F2 F3 F4 B0 B1 B2 B3 B4"),
        ("1f1b", 0, "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4"),
        ("1f1b", 1, "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4"),
        ("1f1b", 2, "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4"),
    ],
)
def test_three_stages_and_five_micro_batches(name: str, stage: int, actions: str) -> None:
    assert spelled(compute_schedule(name, 3, 5)[stage]) == actions


def test_fewer_micro_batches_than_stages() -> None:
    assert [spelled(actions) for actions in compute_schedule("1f1b", 3, 1)] == ["F0 B0"] * 3
    assert [spelled(actions) for actions in compute_schedule("1f1b", 4, 2)] == ["F0 F1 B0 B1"] * 3 + ["F0 B0 F1 B1"]


def test_messages_stand_right_beside_the_passes_that_need_and_feed_them() -> None:
    first, middle, last = with_messages(compute_schedule("1f1b", 3, 2))
    assert spelled(first) == "F0 SA0 F1 SA1 RG0 B0 RG1 B1"
    assert spelled(middle) == "RA0 F0 SA0 RA1 F1 SA1 RG0 B0 SG0 RG1 B1 SG1"
    assert spelled(last) == "RA0 F0 B0 SG0 RA1 F1 B1 SG1"


def test_one_stage_alternates_and_sends_nothing() -> None:
    assert spelled(with_messages(compute_schedule("1f1b", 1, 3))[0]) == "F0 B0 F1 B1 F2 B2"


def test_validation_goes_forward_only() -> None:
    assert [spelled(actions) for actions in with_messages(forward_only(2, 2))] == ["F0 SA0 F1 SA1", "RA0 F0 RA1 F1"]


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"parallel.schedule=zigzag is unknown; give one of gpipe, 1f1b"):
        compute_schedule("zigzag", 2, 2)


def test_a_pass_begins_when_its_stage_is_free_and_its_input_there() -> None:
    cost = {Kind.FORWARD: 1, Kind.BACKWARD: 3}
    first, second = start_times(compute_schedule("1f1b", 2, 2), cost)
    assert {str(a): t for a, t in first.items()} == {"F0": 0, "F1": 1, "B0": 5, "B1": 9}
    assert {str(a): t for a, t in second.items()} == {"F0": 1, "B0": 2, "F1": 5, "B1": 6}


def test_passes_that_wait_for_each_other_have_no_times() -> None:
    wrong = [[Action(Kind.BACKWARD, 0), Action(Kind.FORWARD, 0)], [Action(Kind.FORWARD, 0), Action(Kind.BACKWARD, 0)]]
    with pytest.raises(ValueError, match="wait for each other"):
        start_times(wrong)
