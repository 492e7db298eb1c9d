"""Stages that begin inside layers: what the halves cost, and when they are chosen."""

import random
from dataclasses import fields

import pytest

from bagualu.parallel.balance.stages import choose
from bagualu.parallel.balance.stages.activations import ALL_KEPT, Activations
from bagualu.parallel.balance.stages.choose import CUT_GAIN, choose_split, take_split
from bagualu.parallel.balance.stages.cost import CostTable, LayerCost, joined
from bagualu.parallel.balance.stages.forecast import Split, by_rank, forecast_split
from bagualu.parallel.balance.stages.partition import GaveUp, solve
from bagualu.parallel.balance.stages.problem import Problem
from bagualu.parallel.balance.stages.rebalance_policy import Watch
from bagualu.parallel.balance.stages.refine import TOLERANCE
from bagualu.parallel.balance.stages.show import show_split
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.layer_slice import LayerSlice, cut_inside
from bagualu.parallel.pipeline.registry import compute_schedule
from tests.parallel.balance.examples import (
    all_forward_then_backward,
    bottleneck,
    every_split,
    random_activations,
    random_table,
)

CHOSEN = Activations(recompute=None)


def table_of(layers: int, attention: float, feed_forward: float, head: float, activation: int = 0, kept: int = 0) -> CostTable:
    """`head` in seconds of all passes; `activation` bytes of each half, of which `kept` are its input."""
    halves = [
        LayerCost(name, seconds, seconds, seconds, activation_bytes=activation, input_bytes=kept)
        for name, seconds in (("attention", attention), ("feed-forward", feed_forward))
    ]
    return CostTable(LayerCost("embedding", 0, 0, 0), [joined("layer", *halves)] * layers, LayerCost("head", head, 0, 0), "drawn")


def test_a_head_that_weighs_one_layer_need_not_make_it_five_against_four() -> None:
    schedule = compute_schedule("1f1b", 2, 8)
    split = choose_split(table_of(8, 1.0, 1.0, 6.0), schedule)
    assert split.counts == [4.5, 3.5]
    assert split.forecast is not None
    assert split.forecast.bottleneck_seconds == pytest.approx(27.0)
    whole = take_split([LayerSlice(0, 8), LayerSlice(8, 16)], table_of(8, 1.0, 1.0, 6.0), schedule).forecast
    assert whole is not None
    assert whole.bottleneck_seconds == pytest.approx(30.0)
    assert "0-3 and attention of 4    4.5" in show_split(split, StagePlacement(2))


@pytest.mark.parametrize(("head", "counts"), [(0.0, [4, 4]), (12.0, [5, 3]), (0.3, [4, 4])])
def test_layers_stay_whole_where_a_cut_inside_gains_nothing_or_little(head: float, counts: list[int]) -> None:
    assert choose_split(table_of(8, 1.0, 1.0, head), compute_schedule("1f1b", 2, 8)).counts == counts


def test_layers_stay_whole_without_costs_of_halves_and_on_one_rank() -> None:
    table = table_of(8, 1.0, 1.0, 6.0)
    plain = [LayerCost("layer", 2.0, 2.0, 2.0)] * 8
    schedule = compute_schedule("1f1b", 2, 8)
    assert choose_split(CostTable(table.embedding, plain, table.head, "drawn"), schedule).counts in ([4, 4], [5, 3])
    assert choose_split(table, compute_schedule("1f1b", 1, 8)).counts == [8]


def test_a_cut_inside_is_taken_where_nothing_else_fits() -> None:
    """A rank that may hold 5 halves of activations, of 3 micro-batches in flight at the first stage."""
    table, schedule = table_of(4, 1.0, 1.0, 0.0, activation=10), compute_schedule("1f1b", 3, 6)
    caps = [90, 60, 30]
    split = choose_split(table, schedule, caps=caps)
    assert split.counts == [1.5, 1.5, 1]
    assert split.forecast is not None
    assert split.forecast.memory_bytes == [90, 60, 20]


def test_a_search_for_halves_that_is_given_up_leaves_whole_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = choose.solve

    def only_whole(problem: Problem, work: int = 0) -> object:
        if problem.halves:
            raise GaveUp
        return solve(problem)

    monkeypatch.setattr(choose, "solve", only_whole)
    assert not cut_inside(choose_split(table_of(8, 1.0, 1.0, 6.0), compute_schedule("1f1b", 2, 8)).slices)


@pytest.mark.parametrize("placement", [StagePlacement(3), StagePlacement(2, 2, True), StagePlacement(2, 2)], ids=str)
def test_of_the_splits_near_the_optimum_none_is_faster_and_whole_layers_are_slower(placement: StagePlacement) -> None:
    rng = random.Random(7)
    inside = 0
    for _ in range(12):
        schedule = all_forward_then_backward(placement, rng.randint(1, 4))
        speeds = [rng.choice([0.7, 1.0]) for _ in range(placement.ranks)]
        table = random_table(rng, 5, 3)
        split = choose_split(table, schedule, speeds)
        steps = {}
        for problem in (Problem(table, schedule, speeds, None), Problem(table, schedule, speeds, None, halves=True)):
            times = [
                (bottleneck(problem, pieces) or 0.0, forecast_split(problem, pieces).forecast) for pieces in every_split(problem)
            ]
            allowed = min(seconds for seconds, _ in times) * (1 + TOLERANCE)
            steps[problem.halves] = min(one.step_seconds for seconds, one in times if seconds <= allowed and one is not None)
        assert split.forecast is not None
        if cut_inside(split.slices):
            inside += 1
            assert split.forecast.step_seconds <= min(steps[True] * (1 + 1e-6), steps[False] * (1 - CUT_GAIN))
        else:
            assert split.forecast.step_seconds <= steps[False] * (1 + 1e-6)
            even = Problem(table, schedule, speeds, None).even_seconds()
            little = split.forecast.bottleneck_seconds * (1 - CUT_GAIN) <= even
            assert little or steps[True] > split.forecast.step_seconds * (1 - CUT_GAIN) - 1e-9
    assert inside >= 5


def test_costs_of_halves_add_up_to_those_of_layers_whatever_is_recomputed() -> None:
    """A piece of whole layers costs the same in half layers; cut inside a layer, the two sides add up to it, but for the input of
    the second half, which is kept too where both are computed again."""
    rng = random.Random(11)
    for _ in range(60):
        layers, schedule = 4, all_forward_then_backward(StagePlacement(2), rng.randint(1, 3), rng.random() < 0.3)
        table, activations = random_table(rng, layers), random_activations(rng, layers)
        activations = Activations(activations.recompute or (), None, activations.offload_bytes)
        whole = Problem(table, schedule, [1.0, 0.7], None, activations)
        halves = whole.with_halves()
        for cut in range(1, layers):
            for rank, piece in enumerate(((0, cut), (cut, layers))):
                twice = (2 * piece[0], 2 * piece[1])
                assert halves.memory(rank, (twice,)) == whole.memory(rank, (piece,))
                for field in fields(whole.stage_times(rank, piece)):
                    one, other = (getattr(p.stage_times(rank, q), field.name) for p, q in ((whole, piece), (halves, twice)))
                    assert one == pytest.approx(other)
        for layer in range(layers):
            kept = sum(halves.kept_bytes((unit, unit + 1))[0] for unit in (2 * layer, 2 * layer + 1))
            again = activations.of_layer(layer)
            more = table.layers[layer].input_bytes if again == "full" else 0
            assert kept == whole.kept_bytes((layer, layer + 1))[0] + more


def test_halves_are_chosen_to_recompute_and_named_by_layer() -> None:
    table, schedule = table_of(3, 1.0, 1.0, 0.0, activation=10, kept=2), compute_schedule("1f1b", 2, 4)
    slices = [LayerSlice(0, 3), LayerSlice(3, 6)]
    for cap, expected in (
        (60, ["none", "none", "none"]),
        (50, ["full", "none", "none"]),
        (24, ["full", "attention", "none"]),
    ):
        split = take_split(slices, table, schedule, caps=[cap, 30], activations=CHOSEN)
        assert split.recompute == expected, cap
        again = take_split(slices, table, schedule, activations=Activations(tuple(split.recompute)))
        assert split.forecast is not None
        assert again.forecast is not None
        assert (again.forecast.memory_bytes, again.forecast.times) == (split.forecast.memory_bytes, split.forecast.times)
        assert split.forecast.memory_bytes[0] <= cap
    alone = take_split(slices, table, schedule, caps=[60, 22], activations=CHOSEN)
    assert alone.recompute == ["none", "experts", "full"]


def test_a_list_with_halves_that_does_not_fit_is_refused_in_layers() -> None:
    table, schedule = table_of(3, 1.0, 1.0, 0.0, activation=10), compute_schedule("1f1b", 2, 4)
    with pytest.raises(choose.RecipeError, match=r"parallel.balance=\[1\.5,1\.5\]: pipeline rank 0 needs 60 bytes .* allows 50"):
        take_split([LayerSlice(0, 3), LayerSlice(3, 6)], table, schedule, caps=[50, 50])


def test_splits_and_tables_with_halves_survive_json() -> None:
    table = table_of(8, 1.0, 1.0, 6.0)
    assert CostTable.from_json(table.to_json()) == table
    split = choose_split(table, compute_schedule("1f1b", 2, 8))
    assert Split.from_json(split.to_json()) == split


def test_a_rank_that_becomes_slow_gets_half_a_layer_less() -> None:
    """Equal ranks hold 4 layers each; where the second takes 9 / 7 as long, they take as long with 4.5 and 3.5."""
    table, schedule = table_of(8, 1.0, 1.0, 0.0), compute_schedule("1f1b", 2, 8)
    split = choose_split(table, schedule)
    watch = Watch(table, schedule, split, threshold=0.02, windows=2)
    assert split.counts == [4, 4]
    problem = Problem(table, schedule, [1.0, 7 / 9], None)
    busy = [problem.stage_times(stage, piece).total for stage, piece in enumerate(problem.pieces(split.slices))]
    assert watch.after_window(busy, 1000, lambda _: 1.0) is None
    proposal = watch.after_window(busy, 1000, lambda _: 1.0)
    assert proposal is not None
    assert proposal.split.counts == [4.5, 3.5]
    watch.moved(proposal.split)
    halves = problem.with_halves()
    busy = [halves.stage_times(stage, piece).total for stage, piece in enumerate(halves.pieces(proposal.split.slices))]
    assert busy[0] == pytest.approx(busy[1])
    assert all(watch.after_window(busy, 1000, lambda _: 1.0) is None for _ in range(6))


def test_ranks_of_a_v_may_hold_both_halves_of_the_layer_at_its_turn() -> None:
    table, schedule = table_of(3, 1.0, 1.0, 0.0), all_forward_then_backward(StagePlacement(2, 2, True), 2)
    slices = [LayerSlice(0, 1), LayerSlice(1, 3), LayerSlice(3, 5), LayerSlice(5, 6)]
    split = take_split(slices, table, schedule, activations=ALL_KEPT)
    assert split.forecast is not None
    problem = Problem(table, schedule, [1.0, 1.0], None, halves=True)
    costs = [problem.cost(rank, mine) for rank, mine in enumerate(by_rank(problem, problem.pieces(slices)))]
    assert [cost.seconds for cost in costs if cost] == [6.0, 12.0]


def test_layers_that_recompute_keep_one_input_each_so_that_as_many_fit_as_without_cuts() -> None:
    """Two layers of a rank keep 8 bytes each of 4 micro-batches and, while they go back, what they compute again."""
    table, schedule = table_of(4, 1.0, 1.0, 0.0, activation=10, kept=8), compute_schedule("gpipe", 2, 4)
    whole = Problem(table, schedule, [1.0, 1.0], [76, 76], Activations(("full",) * 4))
    assert [whole.memory(rank, ((2 * rank, 2 * rank + 2),)) for rank in range(2)] == [76, 76]
    found = solve(whole.with_halves())
    assert found is not None
    assert found.pieces == [(0, 4), (4, 8)]
