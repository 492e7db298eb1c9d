"""Which of several failures began the end, and the line that tells it."""

import re

import pytest

from bagualu.comm.errors import CommunicationError, RecipeError
from bagualu.trainer.process.failure import Failure, at_fault, failure, first, last_line, what_next
from bagualu.trainer.recipe.compose import compose


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
    line = last_line(failure(2, "train", caught(ValueError(text)), 0.0), "see the log")
    assert line.startswith("bagualu: failed: rank 2, train")
    assert line.endswith("; see the log")
    assert "\n" not in line


def test_the_phase_tells_the_place_in_our_own_code():
    with pytest.raises(RecipeError) as raised:
        compose(["no.such.key=1"])
    assert re.match(r"train \(trainer/recipe/keys\.py:\d+ in check_key\)", failure(0, "train", raised.value, 0.0).phase)


def test_a_refusal_is_told_as_one():
    line = last_line(failure(1, "train", caught(RecipeError("give x=1")), 0.0), "unused")
    assert line == "bagualu: error: give x=1"


MISSING = {"rank": 2, "step": 5, "phase": "step 5, forward", "why": "rank 2 is at forward of step 5, 600 s without a change"}


def gave_up(rank, time, missing=None):
    return Failure(rank, "step 5, reduce", "CommunicationError: all_reduce timed out", time, "peer", 5, missing)


def test_who_lost_a_peer_is_not_named_but_who_was_missing():
    told = at_fault(first([gave_up(0, 1.0), gave_up(1, 2.0, MISSING)]), unwatched=True)
    assert (told.rank, told.phase, told.step, told.kind) == (2, "step 5, forward", 5, "hung")
    assert told.cause == f"{MISSING['why']}; noticed by rank 1: CommunicationError: all_reduce timed out"


@pytest.mark.parametrize(("unwatched", "fix"), [(True, ": set restart.hang_seconds"), (False, "")])
def test_who_lost_a_peer_is_not_named_where_it_is_not_known_who_was_missing(unwatched, fix):
    told = at_fault(first([gave_up(0, 1.0), gave_up(1, 2.0)]), unwatched)
    line = last_line(told, "see the log")
    assert line == ("bagualu: failed: no single rank, step 5, reduce: noticed by rank 0: CommunicationError: all_reduce timed out; "
                    f"who is missing is unknown{fix}; see the log")  # fmt: skip
    assert (told.kind, told.step) == ("peer", 5)


def test_what_is_not_about_a_peer_is_told_as_it_is():
    own = Failure(1, "step 5, reduce", "ValueError", 1.0, step=5)
    assert at_fault(own, unwatched=True) is own


def test_to_resume_is_the_advice_only_where_it_helps():
    lines = {kind: what_next(Failure(0, "step 5", "it", 0.0, kind)) for kind in ("killed", "loop", "final")}
    assert lines["killed"] == "go on with checkpoint.resume=true"
    assert lines["loop"] == "put that right, then go on with checkpoint.resume=true"
    assert "checkpoint.resume" not in lines["final"]
