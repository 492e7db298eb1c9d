"""The worst moments of a schedule, against the checker and against counting."""

import pytest

from bagualu.parallel.balance.stages.cost import CostTable, LayerCost
from bagualu.parallel.balance.stages.memory import worst_moments
from bagualu.parallel.balance.stages.problem import Problem
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.check import check
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.parallel.pipeline.schedules.schedule import with_messages
from tests.parallel.balance.examples import all_forward_then_backward


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_a_schedule_of_one_stage_a_rank_has_the_peak_that_the_checker_reports(name: str) -> None:
    for ranks, micro_batches in ((1, 3), (4, 2), (4, 9)):
        schedule = with_messages(compute_schedule(name, ranks, micro_batches))
        assert worst_moments(schedule) == [[((peak, 0),)] for peak in check(schedule)]


def test_two_stages_and_a_split_backward_have_several_worst_moments() -> None:
    """Rank 0 of one, stages 0 and 1: all forward, then input gradients from the last stage down, then weight gradients."""
    schedule = all_forward_then_backward(StagePlacement(1, 2), 2, split=True)
    assert worst_moments(schedule) == [[((2, 0), (a, 2 - a)) for a in (2, 1, 0)] + [((1, 1), (0, 2)), ((0, 2), (0, 2))]]


def test_memory_is_the_peak_of_the_whole_rank_not_the_sum_of_peaks() -> None:
    layer = LayerCost("layer", 1, 1, 1, state_bytes=1000, activation_bytes=100, input_bytes=10, operand_bytes=7)
    nothing = LayerCost("", 0, 0, 0)
    problem = Problem(
        CostTable(nothing, [layer] * 2, nothing, ""), all_forward_then_backward(StagePlacement(1, 2), 2, True), [1.0], None
    )
    pieces = ((0, 1), (1, 2))
    assert problem.memory(0, pieces, (False, False)) == 2000 + 400
    assert problem.memory(0, pieces, (False, True)) == 2000 + 200 + 2 * 10 + 90  # a layer's own activations while it is used
    heavy = LayerCost("layer", 1, 1, 1, state_bytes=1000, activation_bytes=100, input_bytes=10, operand_bytes=130)
    problem = Problem(CostTable(nothing, [heavy] * 2, nothing, ""), problem.schedule, [1.0], None)
    assert problem.memory(0, pieces, (False, False)) == 2000 + 4 * 130
