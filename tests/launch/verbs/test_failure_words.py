"""The words about failures among those of `bagualu simulate`."""

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.forecast.assumptions import Assumptions
from bagualu.launch.verbs.failure_words import split_failure_words
from bagualu.trainer.simulation.failures import FailureQuestion


def test_the_words_about_failures_are_taken_out():
    question, others = split_failure_words(["recipe=tiny", "days=30", "world=8", "spares=2", "assume.repair_hours=6"])
    assert question == FailureQuestion(30.0, 2, Assumptions(repair_hours=6.0), asked=True)
    assert others == ["recipe=tiny", "world=8"]


def test_without_them_nobody_has_asked():
    assert split_failure_words(["recipe=tiny", "days"]) == (FailureQuestion(), ["recipe=tiny", "days"])


@pytest.mark.parametrize(("words", "named"), [
    (["days=0"], "days=0 must be a number above 0"), (["days=soon"], "days=soon"), (["days=nan"], "days=nan"),
    (["days=1e9"], "3650"), (["spares=-1"], "spares=-1 must be a whole number"), (["spares=1.5"], "spares=1.5"),
    (["days=3", "days=4"], "second days"),
    (["assume.repair_hour=3"], "did you mean repair_hours"), (["assume.repair_hours=-3"], "at least 0"),
    (["assume.failure_factor=-1"], "failure_factor=-1"), (["assume.=1"], "unknown assumption"),
])  # fmt: skip
def test_wrong_words_are_refused_in_one_line(words, named):
    with pytest.raises(RecipeError, match=named) as refused:
        split_failure_words(words)
    assert "\n" not in str(refused.value)
