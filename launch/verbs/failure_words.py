"""The words of `bagualu simulate` that ask what failures will cost: days, spares and assume.NAME."""

import math
from collections.abc import Sequence

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.forecast.assumptions import Assumptions
from bagualu.launch.verbs.command_line import FAILURE_KEYS
from bagualu.launch.verbs.own_words import split_words
from bagualu.trainer.simulation.failures import FailureQuestion

_ASSUME = "assume."


def split_failure_words(words: Sequence[str]) -> tuple[FailureQuestion, list[str]]:
    """Returns what the words ask about failures, and the other words. Raises RecipeError for an unknown or impossible figure."""
    own, others = split_words(words, lambda key: key in FAILURE_KEYS or key.startswith(_ASSUME))
    assumed = {key.removeprefix(_ASSUME): value for key, value in own.items() if key.startswith(_ASSUME)}
    question = FailureQuestion(
        days=_days(own["days"]) if "days" in own else FailureQuestion.days,
        spares=_spares(own["spares"]) if "spares" in own else None,
        assumptions=Assumptions().changed(assumed),
        asked=bool(own),
    )
    return question, others


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = math.nan
    if not 0 < days <= 3650:
        raise RecipeError(f"days={text} must be a number above 0, and at most 3650, e.g. days=14")
    return days


def _spares(text: str) -> int:
    try:
        spares = int(text)
    except ValueError:
        spares = -1
    if spares < 0:
        raise RecipeError(f"spares={text} must be a whole number of nodes, at least 0, e.g. spares=8")
    return spares
