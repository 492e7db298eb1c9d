"""All ranks or none: a failure of one rank is raised on all, alike."""

import pytest

from bagualu.comm.agree import RankError, any_rank, first_different, gather, maxima, maximum, on_all, total, totals
from bagualu.comm.errors import CommunicationError, RecipeError
from bagualu.comm.group import Communicator
from tests.harness import run


class Away(RankError):
    """A failure that may pass."""


def outcome(communicator: Communicator, failing: dict[int, Exception]) -> str:
    def work() -> int:
        if communicator.rank in failing:
            raise failing[communicator.rank]
        return communicator.rank

    try:
        return str(on_all(work, communicator.world, RankError, Away))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("backend", ["gloo", "simulated"])
@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ({}, None),
        ({1: OSError("disk\nfull")}, "RankError: rank 1: OSError: disk full"),
        ({1: Away("later"), 2: Away("much later")}, "Away: rank 1 (and 1 more ranks): later"),
        ({0: Away("later"), 2: ValueError("never")}, "RankError: rank 2 (and 1 more ranks): ValueError: never"),
        ({0: ValueError("never"), 2: RecipeError("give x=1")}, "RecipeError: give x=1"),
    ],
)
def test_every_rank_raises_the_same_error(backend: str, failing: dict[int, Exception], expected: str | None) -> None:
    outcomes = run(backend, 3, outcome, failing)
    assert outcomes == ([expected] * 3 if expected else ["0", "1", "2"])


def test_a_lost_peer_is_reported_at_once_and_not_agreed_on() -> None:
    assert run("simulated", 1, outcome, {0: CommunicationError("gone")}) == ["CommunicationError: gone"]


def figures(communicator: Communicator) -> list[object]:
    rank, group = communicator.rank, communicator.world
    return [
        any_rank(rank == 1, group),
        any_rank(False, group),
        maximum(-rank, group),
        total(2.0**50 + rank, group),
        gather(rank, group),
        totals([rank, 1.0], group),
        totals([], group),
        maxima([rank, -rank], group),
    ]


@pytest.mark.parametrize("backend", ["gloo", "simulated"])
def test_scalars_are_reduced_over_all_ranks(backend: str) -> None:
    expected = [True, False, 0.0, 3 * 2.0**50 + 3, [0.0, 1.0, 2.0], [3.0, 3.0], [], [2.0, 0.0]]
    assert run(backend, 3, figures) == [expected] * 3


def compared(communicator: Communicator, values: list[object]) -> object:
    return first_different(values[communicator.rank], communicator.world)


@pytest.mark.parametrize("backend", ["gloo", "simulated"])
def test_the_first_rank_with_another_value_is_named(backend: str) -> None:
    assert run(backend, 3, compared, [{"a": [1, "x"], "b": 2}] * 3) == [None] * 3
    assert run(backend, 3, compared, ["x", "x", "y"]) == [(2, "y", "x")] * 3
    assert run(backend, 3, compared, [1, 2, 3]) == [(1, 2, 1)] * 3
    assert run(backend, 3, compared, [[1], [1], [1.0]]) == [(2, [1.0], [1])] * 3, "written otherwise is another value"
