"""Estimates of steps are near what the replay of their whole traces predicts."""

from dataclasses import replace
from functools import cache

import pytest

from bagualu.comm.cluster_file import load_cluster
from bagualu.parallel.planner.layouts import Degrees, PlannedLayout, degrees, layouts
from bagualu.parallel.simulation.operator_cost import operator_seconds
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.simulation.estimate import StepEstimator
from bagualu.trainer.simulation.layout_costs import LayoutCosts
from bagualu.trainer.simulation.passes import Division, LayerKind, LayerTraces
from bagualu.trainer.simulation.predict import predict
from bagualu.trainer.simulation.search_space import plannable, search_space
from bagualu.trainer.simulation.trace import Traced

SIZES = ["model.layers=8", "model.hidden=2048", "model.heads=16", "model.kv_heads=16", "model.vocab=32000", "train.dtype=bfloat16"]
SHAPE = [*SIZES, "data.source=random", "data.sequence_length=4096", "data.global_batch=32"]
DENSE = ["recipe=tiny_dense", *SHAPE, "model.ffn=8192"]
MIXTURE = ["recipe=moe_tiny", *SHAPE, "model.ffn=8192", "model.moe.experts=8", "model.moe.ffn=2048"]


@cache
def costs_of(words: tuple[str, ...], world: int, cluster: str = "h100") -> LayoutCosts:
    sized = load_cluster(cluster).for_world(world)
    recipe = plannable(compose(list(words)), sized, [])
    estimator = StepEstimator(recipe, sized, world, LayerTraces(recipe, Traced()), operator_seconds)
    return LayoutCosts(recipe, estimator, lambda other: predict(other, sized, world))


def layout(
    data, tensor=1, pipeline=1, expert=1, micro_batch=1, schedule="1f1b", stages=None, recompute="none", zero=1, balance="uniform"
):
    degrees = Degrees(data, tensor, pipeline, expert, micro_batch, tensor > 1)
    return PlannedLayout(degrees, schedule, stages, recompute, zero, balance)


@pytest.mark.parametrize(
    ("words", "one"),
    [
        (DENSE, layout(8, 2, recompute="attention")),
        pytest.param(DENSE, layout(4, 2, 2, micro_batch=2), marks=pytest.mark.slow),
        (DENSE, layout(4, pipeline=4, schedule="zb_v", recompute="full")),
        (DENSE, layout(16, zero=3)),
        (DENSE, layout(8, pipeline=2, schedule="interleaved_1f1b", stages=2, zero=2)),
        (DENSE, layout(2, 8, recompute="every:2", micro_batch=4)),
        pytest.param(DENSE, layout(2, 2, 4, schedule="gpipe", zero=0), marks=pytest.mark.slow),
        (MIXTURE, layout(8, 2, expert=4, recompute="experts")),
        pytest.param(MIXTURE, layout(8, pipeline=2, expert=2, schedule="zb_h1"), marks=pytest.mark.slow),
        (DENSE, layout(4, 2, 2, micro_batch=2, recompute="attention", balance=(4.5, 3.5))),
        (MIXTURE, layout(8, pipeline=2, expert=2, balance=(3.5, 4.5))),
        pytest.param(MIXTURE, layout(16, expert=8, zero=2), marks=pytest.mark.slow),
    ],
)
def test_an_estimate_is_near_the_prediction(words, one):
    costs = costs_of(tuple(words), 16)
    exact, need = costs.exact(one)
    assert costs.estimate(one).total == pytest.approx(exact.step_seconds, rel=0.1)
    assert costs.need(one).bytes == pytest.approx(need.bytes, rel=0.1)


def test_no_layout_is_estimated_to_take_less_than_the_bound_of_its_degrees():
    costs = costs_of(tuple(DENSE), 16)
    space = search_space(costs.recipe, load_cluster("h100").for_world(16), 16, [])
    for of in [one for one in degrees(space) if one.micro_batch == 1 and one.tensor <= 2][::3]:
        least = costs.least_seconds(of)
        assert all(costs.estimate(one).total >= least * (1 - 1e-9) for one in layouts(space, of))


def test_layers_are_traced_once_for_each_way_to_divide_them():
    recipe = costs_of(tuple(DENSE), 16).recipe
    traces = LayerTraces(recipe, Traced())
    division = Division(tensor=2, expert=1, sequence=True, micro_batch=1)
    assert traces.of(division, LayerKind.DENSE) is traces.of(division, LayerKind.DENSE)
    again = traces.of(Division(2, 1, True, 1, "full"), LayerKind.DENSE)
    assert again is not traces.of(division, LayerKind.DENSE)
    last = traces.of(division, LayerKind.LAST)
    assert last is traces.of(Division(2, 1, True, 4, "full"), LayerKind.LAST)
    assert last.besides is LayerKind.DENSE


def test_recomputation_adds_what_is_computed_again():
    costs = costs_of(tuple(DENSE), 16)
    steps = {part: costs.estimate(layout(16, recompute=part)).seconds for part in ("none", "attention", "every:2", "full")}
    kinds = ("matrix products", "attention", "other kernels")
    again = {part: sum(step[kind] - steps["none"][kind] for kind in kinds) for part, step in steps.items()}
    assert 0 < again["attention"] < again["full"]
    assert again["every:2"] == pytest.approx(again["full"] / 2)


@pytest.mark.parametrize(
    ("words", "one"),
    [
        (DENSE, layout(4, 2, 2, micro_batch=2, recompute="full", zero=2)),
        (DENSE, layout(4, pipeline=4, schedule="zb_v", zero=3)),
        (MIXTURE, layout(8, pipeline=2, expert=2)),
    ],
)
def test_an_estimate_has_the_parts_of_a_prediction(words, one):
    """Their parts have the same names, so that a table can show both."""
    costs = costs_of(tuple(words), 16)
    parts = costs.exact(one)[0].parts()
    estimated = {part for part, seconds in costs.estimate(one).seconds.items() if seconds > 0}
    assert estimated <= parts.keys()
    assert parts.keys() - estimated <= {"agreement of all ranks", "waiting for ranks with more work", "data communication"}


def test_slower_chips_get_fewer_layers_and_fewer_micro_batches():
    costs = costs_of((*DENSE, "data.global_batch=64"), 16, "mixed_h100_a100")
    (split,) = costs.variations(layout(4, 2, 2))
    assert sum(split.balance) == 8
    assert split.balance[0] > split.balance[1]  # the first ranks are the H100
    assert costs.estimate(split).total < costs.estimate(layout(4, 2, 2)).total
    (folded,) = costs.variations(layout(4, 2, 2, schedule="zb_v"))
    assert folded.balance[0] - folded.balance[3] in (0, 1)  # both of the first rank
    assert folded.balance[0] > folded.balance[1]
    (shared,) = costs.variations(layout(8, 2))
    assert sum(shared.shares) == 64
    assert min(shared.shares[:4]) > max(shared.shares[4:])
    assert costs.estimate(shared).total < costs.estimate(layout(8, 2)).total
    assert costs.exact(shared)[0].step_seconds < costs.exact(layout(8, 2))[0].step_seconds


def test_layers_are_divided_unevenly_where_the_head_weighs_much():
    heavy = costs_of((*DENSE, "model.vocab=256000", "model.layers=12"), 16)
    (split,) = heavy.variations(layout(4, pipeline=4))
    assert split.balance[-1] < split.balance[1]
    assert heavy.estimate(split).total < heavy.estimate(layout(4, pipeline=4)).total


def test_stages_begin_inside_layers_where_whole_ones_are_uneven():
    """The head takes as long as three layers and a quarter."""
    costs, one = costs_of((*DENSE, "model.vocab=64000", "data.global_batch=128"), 16), layout(8, pipeline=2)
    (split,) = costs.variations(one)
    assert split.balance == (5.5, 2.5)
    steps = [costs.exact(replace(one, balance=balance))[0].step_seconds for balance in (split.balance, (5, 3), (6, 2))]
    assert steps[0] < min(steps[1:])


def test_halves_take_as_long_together_as_their_layer():
    for words in (DENSE, MIXTURE):
        costs = costs_of(tuple(words), 16)
        one, block = layout(8, 2, recompute="attention"), costs._estimator.blocks(1)[0]
        pairs = zip(costs._table(one, block).layers, costs._table(one, block, halves=True).layers, strict=True)
        for whole, halves in pairs:
            assert halves.forward_seconds == pytest.approx(whole.forward_seconds, rel=0.02)
            assert halves.input_gradient_seconds == pytest.approx(whole.input_gradient_seconds, rel=0.02)
            assert halves.weight_gradient_seconds == pytest.approx(whole.weight_gradient_seconds, rel=0.02)
