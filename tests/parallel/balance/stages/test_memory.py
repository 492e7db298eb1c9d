"""The worst moments of a schedule, against the checker and against counting."""

import random
from dataclasses import replace

import pytest

from bagualu.parallel.balance.stages.activations import Activations
from bagualu.parallel.balance.stages.cost import CostTable, LayerCost
from bagualu.parallel.balance.stages.memory import worst_moments
from bagualu.parallel.balance.stages.problem import Problem
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.check import check
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.parallel.pipeline.schedules.schedule import Kind, with_messages
from tests.parallel.balance.examples import all_forward_then_backward, random_activations, random_table


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_a_schedule_of_one_stage_a_rank_has_the_peak_that_the_checker_reports(name: str) -> None:
    for ranks, micro_batches in ((1, 3), (4, 2), (4, 9)):
        schedule = with_messages(compute_schedule(name, ranks, micro_batches))
        assert worst_moments(schedule) == [[((peak, 0),)] for peak in check(schedule)]


def test_two_stages_and_a_split_backward_have_several_worst_moments() -> None:
    """Rank 0 of one, stages 0 and 1: all forward, then input gradients from the last stage down, then weight gradients."""
    schedule = all_forward_then_backward(StagePlacement(1, 2), 2, split=True)
    assert worst_moments(schedule) == [[((2, 0), (a, 2 - a)) for a in (2, 1, 0)] + [((1, 1), (0, 2)), ((0, 2), (0, 2))]]


def counted(problem: Problem, chosen: frozenset[int]) -> int:
    """The most bytes that a rank with one stage holds, counted from layer to layer through its passes."""
    table, actions = problem.table, problem.schedule.actions[0]
    parts = [problem.activations.of_layer(i, chosen) for i in range(problem.units)]
    held = most = 0
    for action in actions:
        if action.kind == Kind.FORWARD:
            held += table.embedding.activation_bytes + table.head.activation_bytes
            held += sum(layer.kept_bytes(part) for layer, part in zip(table.layers, parts, strict=True))
            most = max(most, held)
        elif action.kind == Kind.WEIGHT_GRADIENT:
            held -= sum(layer.operand_bytes for layer in [table.embedding, *table.layers, table.head])
        else:
            splits = action.kind == Kind.INPUT_GRADIENT
            held -= table.head.activation_bytes
            for layer, part in reversed(list(zip(table.layers, parts, strict=True))):
                most = max(most, held - layer.kept_bytes(part) + layer.working_bytes(part))
                held += layer.operand_bytes * splits - layer.kept_bytes(part)
            held += (table.embedding.operand_bytes + table.head.operand_bytes) * splits - table.embedding.activation_bytes
            most = max(most, held)
    assert held == 0
    return most


def test_the_peak_is_that_counted_from_layer_to_layer() -> None:
    rng, above = random.Random(1), 0
    for _ in range(200):
        layers = rng.randint(1, 6)
        name = rng.choice(["1f1b", "zb_h1", None])
        count, splits = rng.randint(1, 3), rng.random() < 0.5
        schedule = compute_schedule(name, 1, count) if name else all_forward_then_backward(StagePlacement(1), count, splits)
        activations = replace(random_activations(rng, layers), offload_bytes=0)
        problem = Problem(random_table(rng, layers), schedule, [1.0], None, activations)
        chosen = frozenset(i for i in range(layers) if rng.random() < 0.5)
        assert problem.transient_bytes(0, ((0, layers),), chosen) == counted(problem, chosen)
        above += problem.transient_bytes(0, ((0, layers),), chosen) > problem.transient_bytes(0, ((0, layers),), frozenset())
    assert above == 0  # to recompute more never takes more


def test_memory_is_the_peak_of_the_whole_rank_not_the_sum_of_peaks() -> None:
    layer = LayerCost("layer", 1, 1, 1, state_bytes=1000, activation_bytes=100, input_bytes=10, operand_bytes=7)
    nothing = LayerCost("", 0, 0, 0)
    problem = Problem(
        CostTable(nothing, [layer] * 2, nothing, ""), all_forward_then_backward(StagePlacement(1, 2), 2, True), [1.0], None
    )
    pieces = ((0, 1), (1, 2))
    assert problem.memory(0, pieces) == 2000 + 400
    problem = Problem(problem.table, problem.schedule, [1.0], None, Activations(None))
    assert problem.memory(0, pieces, frozenset([1])) == 2000 + 200 + 2 * 10 + 90  # a layer's own activations while it is used
    heavy = LayerCost("layer", 1, 1, 1, state_bytes=1000, activation_bytes=100, input_bytes=10, operand_bytes=130)
    problem = Problem(CostTable(nothing, [heavy] * 2, nothing, ""), problem.schedule, [1.0], None)
    assert problem.memory(0, pieces) == 2000 + 4 * 130
