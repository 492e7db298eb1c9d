"""Which of several failures began the end, and the line that tells it."""

import re

import pytest

from bagualu.comm.errors import CommunicationError, RecipeError
from bagualu.trainer.outcome import Failure, failure, first, last_words
from bagualu.trainer.recipe import compose


def caught(error):
    try:
        raise error
    except Exception as raised:
        return raised


def test_an_error_of_a_ranks_own_goes_before_lost_peers_and_a_kill_before_errors():
    lost = failure(0, "train", caught(CommunicationError("peer gone")), 1.0)
    early = failure(2, "train", caught(ValueError("early")), 2.0)
    late = failure(1, "train", caught(ValueError("late")), 3.0)
    killed = Failure(3, "train", "killed by SIGKILL", 4.0, "killed")
    assert first([lost, late, early]) is early
    assert first([lost, late, early, killed]) is killed
    assert first([lost]) is lost


@pytest.mark.parametrize("text", ["", "one line", "two\nlines"])
def test_the_last_words_are_one_line(text):
    line = last_words(failure(2, "train", caught(ValueError(text)), 0.0), "see the log")
    assert line.startswith("bagualu: failed: rank 2, train")
    assert line.endswith("; see the log")
    assert "\n" not in line


def test_the_phase_tells_the_place_in_our_own_code():
    with pytest.raises(RecipeError) as raised:
        compose(["no.such.key=1"])
    assert re.match(r"train \(trainer/recipe_keys\.py:\d+ in check_override\)", failure(0, "train", raised.value, 0.0).phase)


def test_a_refusal_is_told_as_one():
    words = last_words(failure(1, "train", caught(RecipeError("give x=1")), 0.0), "unused")
    assert words == "bagualu: error: give x=1"
