"""What is chosen, timed on the schedule; and what is said when nothing fits."""

import random
import re
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.parallel.balance.stages import choose, refine
from bagualu.parallel.balance.stages.activations import ALL_KEPT, Activations
from bagualu.parallel.balance.stages.choose import choose_split, take_split
from bagualu.parallel.balance.stages.cost import CostTable, LayerCost
from bagualu.parallel.balance.stages.forecast import Split, by_rank, forecast_split
from bagualu.parallel.balance.stages.partition import solve
from bagualu.parallel.balance.stages.problem import Problem
from bagualu.parallel.balance.stages.refine import TOLERANCE
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.layer_slice import LayerSlice, cut_inside
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.parallel.pipeline.schedules.schedule import Schedule
from tests.parallel.balance.examples import all_forward_then_backward, bottleneck, every_split, random_table

CHOSEN = Activations(recompute=None)


def uniform_table(layers: int, head: float = 0.0, state: int = 0, activation: int = 0, kept: int = 0) -> CostTable:
    layer = LayerCost("layer", 1.0, 1.0, 1.0, state, activation, kept)
    return CostTable(LayerCost("embedding", 0, 0, 0), [layer] * layers, LayerCost("head", head, 0, 0), "drawn")


def counts(split: Split) -> list[int | float]:
    return split.counts


def test_a_heavy_head_takes_layers_off_the_last_stage() -> None:
    assert counts(choose_split(uniform_table(8, head=6.0), compute_schedule("1f1b", 2, 4))) == [5, 3]


def test_a_rank_of_half_the_speed_takes_half_the_layers() -> None:
    split = choose_split(uniform_table(9), compute_schedule("1f1b", 2, 4), speeds=[0.5, 1.0])
    assert counts(split) == [3, 6]
    assert split.forecast is not None
    assert split.forecast.bottleneck_seconds == pytest.approx(18.0)
    assert split.forecast.times[0].forward == pytest.approx(6.0)


def test_the_predicted_step_is_that_of_the_schedule() -> None:
    """1F1B of equal stages: (m + p - 1) times a stage's forward and backward pass."""
    schedule = compute_schedule("1f1b", 4, 8)
    plain = choose_split(uniform_table(8), schedule).forecast
    assert plain is not None
    assert plain.step_seconds == pytest.approx((8 + 4 - 1) * 2 * 3.0)


@pytest.mark.parametrize("placement", [StagePlacement(3), StagePlacement(2, 2, True), StagePlacement(2, 2)], ids=str)
def test_of_the_splits_near_the_optimum_none_is_faster_on_the_schedule(placement: StagePlacement) -> None:
    rng = random.Random(7)
    for _ in range(40):
        schedule = all_forward_then_backward(placement, rng.randint(1, 4))
        problem = Problem(random_table(rng, 8, 3), schedule, [rng.choice([0.7, 1.0]) for _ in range(placement.ranks)], None)
        found = choose_split(problem.table, schedule, problem.speeds).forecast
        optimum = solve(problem)
        assert found is not None
        assert optimum is not None
        allowed = optimum.bottleneck_seconds * (1 + TOLERANCE + 1e-9)
        assert found.bottleneck_seconds <= allowed
        near = [forecast_split(problem, p).forecast for p in every_split(problem) if (bottleneck(problem, p) or 0) <= allowed]
        fastest = min(one.step_seconds for one in near if one is not None)
        assert found.step_seconds <= fastest * (1 + 1e-6)


def test_moves_alone_come_close_to_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many splits to look at all."""
    rng = random.Random(8)
    ratios = []
    for _ in range(20):
        table, schedule = random_table(rng, 12, 3), compute_schedule("1f1b", 4, 6)
        fastest = choose_split(table, schedule).forecast
        monkeypatch.setattr(refine, "_FEW", 0)
        found = choose_split(table, schedule).forecast
        monkeypatch.undo()
        assert found is not None
        assert fastest is not None
        ratios.append(found.step_seconds / fastest.step_seconds)
    assert sum(ratio <= 1 + 1e-9 for ratio in ratios) >= 15
    assert max(ratios) < 1.03


def test_recompute_is_chosen_only_where_memory_demands_it() -> None:
    table, schedule = uniform_table(4, activation=100, kept=10), compute_schedule("1f1b", 2, 4)
    free = choose_split(table, schedule, caps=[400, 200], activations=CHOSEN)  # rank 0 holds 2 micro-batches, rank 1 one
    assert (counts(free), free.recompute) == ([2, 2], ["none"] * 4)
    tight = choose_split(table, schedule, caps=[399, 200], activations=CHOSEN)
    assert (counts(tight), tight.recompute) == ([2, 2], ["full", "none", "none", "none"])
    assert tight.forecast is not None
    assert tight.forecast.bottleneck_seconds == pytest.approx(7.0)
    assert tight.forecast.memory_bytes == [220, 200]
    assert tight.forecast.times[0].input_gradient == pytest.approx(3.0)


def test_the_layers_that_recompute_are_nearly_the_best_choice() -> None:
    """Against every set of layers: they are found exactly when some fit, and take at most one forward pass longer."""
    rng = random.Random(6)
    fitted = best = 0
    for _ in range(100):
        schedule, layers = all_forward_then_backward(StagePlacement(1), rng.randint(1, 4), rng.random() < 0.3), 7
        table = random_table(rng, layers, rng.choice([1, 2, None]))
        most = rng.randint(50, 95) * schedule.micro_batches
        problem = Problem(table, schedule, [1.0], None, Activations(None, most, rng.choice([0, 10])))
        pieces = ((0, layers),)
        sets = [frozenset(chosen) for count in range(layers + 1) for chosen in combinations(range(layers), count)]
        fits = [chosen for chosen in sets if problem.transient_bytes(0, pieces, chosen) <= most]
        cost = problem.cost(0, pieces)
        assert (cost is None) == (not fits)
        if cost is not None:
            forward = [layer.forward_seconds for layer in table.layers]
            taken, least = sum(forward[i] for i in cost.chosen), min(sum(forward[i] for i in chosen) for chosen in fits)
            assert cost.chosen in fits
            assert taken <= least + max(forward) + 1e-9
            fitted += bool(cost.chosen)
            best += bool(cost.chosen) and taken <= least + 1e-9
    assert fitted > 40
    assert best > 15


def test_the_number_of_bytes_is_kept_to_or_refused_with_one_that_works() -> None:
    rng = random.Random(9)
    refused = recomputed = 0
    for _ in range(60):
        placement = rng.choice([StagePlacement(1), StagePlacement(3), StagePlacement(2, 2, True)])
        table, schedule = random_table(rng, 6), all_forward_then_backward(placement, 2, rng.random() < 0.3)
        caps = [rng.randint(80, 200)] * placement.ranks if rng.random() < 0.3 else None
        message = ""
        activations = Activations(None, rng.randint(20, 120))
        try:
            split = choose_split(table, schedule, caps=caps, activations=activations)
        except RecipeError as error:
            message = str(error)
        if message:
            refused += 1
            fixes = dict(word.split("=") for word in message.split("; give ")[1].split())
            enough = activations
            if "train.recompute" in fixes:
                enough = replace(activations, most_bytes=int(fixes["train.recompute"].removeprefix("bytes:")))
            if "parallel.memory_bytes" in fixes:
                caps = [int(fixes["parallel.memory_bytes"])] * placement.ranks
            if "activations" in message:
                found = re.search(r"activations of (\d+) bytes .*, (\d+) more than train.recompute=bytes:(\d+) allows", message)
                assert found, message
                assert int(found[1]) - int(found[2]) == int(found[3]) == activations.most_bytes
            split, activations = choose_split(table, schedule, caps=caps, activations=enough), enough
        problem = Problem(table, schedule, [1.0] * placement.ranks, caps, activations, cut_inside(split.slices))
        chosen = problem.recomputing(split.recompute)
        for rank, mine in enumerate(by_rank(problem, problem.pieces(split.slices))):
            assert problem.transient_bytes(rank, mine, chosen) <= (activations.most_bytes or 0)
        recomputed += bool(chosen)
    assert 15 < refused < 50
    assert recomputed > 20


def test_a_list_of_layers_that_keeps_too_many_bytes_is_refused_by_how_much() -> None:
    table, schedule = uniform_table(6, activation=10, kept=2), compute_schedule("1f1b", 2, 4)
    slices = [LayerSlice(0, 8), LayerSlice(8, 12)]
    for most, expected in ((80, 0), (79, 1), (24, 4)):  # rank 0 has 2 micro-batches in flight, and recomputes a layer of 10
        split = take_split(slices, table, schedule, activations=Activations(None, most))
        assert split.recompute.count("full") == expected, most
    with pytest.raises(RecipeError, match=r"parallel.balance=\[4,2\]: pipeline rank 0 needs activations of 24 bytes with all its "
                                          r"layers recomputed, 1 more than train.recompute=bytes:23 allows; "
                                          r"give parallel.balance=analytic or train.recompute=bytes:24"):  # fmt: skip
        take_split(slices, table, schedule, activations=Activations(None, 23))


def test_host_memory_takes_all_activations_but_those_of_two_layers() -> None:
    table = uniform_table(6, state=1, activation=10)
    one, three = compute_schedule("1f1b", 1, 3), compute_schedule("gpipe", 1, 3)
    for offload, expected in ((0, (66, 186)), (15, (51, 186)), (40, (26, 166)), (1000, (26, 26))):
        for schedule, memory in zip((one, three), expected, strict=True):
            split = take_split([LayerSlice(0, 12)], table, schedule, activations=Activations(offload_bytes=offload))
            assert split.forecast is not None
            assert split.forecast.memory_bytes == [memory]
    assert refusal(table, one, [50])
    assert not refusal(table, one, [50], Activations(offload_bytes=16))


def test_the_first_stage_holds_more_micro_batches_and_so_fewer_layers_under_equal_caps() -> None:
    table, schedule = uniform_table(12, state=1, activation=10), compute_schedule("1f1b", 4, 8)
    split = choose_split(table, schedule, caps=[90] * 4)
    assert counts(split)[0] == 2  # 2 x (1 + 4 x 10) fits 90 and 3 do not
    assert split.forecast is not None
    assert all(need <= 90 for need in split.forecast.memory_bytes)


def refusal(table: CostTable, schedule: Schedule, caps: list[int], activations: Activations = ALL_KEPT) -> str:
    """Empty where there is a split."""
    try:
        choose_split(table, schedule, caps=caps, activations=activations)
    except RecipeError as error:
        return str(error)
    return ""


def test_caps_that_nothing_fits_are_refused_with_ones_that_work() -> None:
    rng = random.Random(3)
    refused = []
    for _ in range(60):
        placement = rng.choice([StagePlacement(3), StagePlacement(2, 2, True), StagePlacement(2, 2)])
        table, schedule = random_table(rng, 6), all_forward_then_backward(placement, 2)
        equal = rng.random() < 0.5
        caps = [rng.randint(10, 120)] * placement.ranks if equal else [rng.randint(10, 120) for _ in range(placement.ranks)]
        if message := refusal(table, schedule, caps):
            refused.append(message)
            match = re.fullmatch(r"pipeline rank \d needs \d+ bytes but parallel.memory_bytes allows \d+; "
                                 r"give (train.recompute=auto or )?parallel.memory_bytes=\[?([\d,]+)\]?", message)  # fmt: skip
            assert match, message
            enough = [int(one) for one in match[2].split(",")]
            assert not refusal(table, schedule, enough * (placement.ranks // len(enough))), message
            assert bool(match[1]) == (refusal(table, schedule, caps, CHOSEN) == "")
    assert sum("train.recompute=auto" in message for message in refused) > 5
    assert sum("=[" in message for message in refused) > 5


def test_a_list_that_does_not_fit_is_refused_and_one_that_does_is_taken() -> None:
    table, schedule = uniform_table(6, state=10, activation=10, kept=1), compute_schedule("1f1b", 2, 4)
    slices = [LayerSlice(0, 8), LayerSlice(8, 12)]
    taken = take_split(slices, table, schedule, caps=[120, 120])
    assert taken.slices == slices
    lacking = r"parallel.balance=\[4,2\]: pipeline rank 0 needs 120 bytes .* allows 100; "
    fixes = "give train.recompute=auto or parallel.balance=analytic or parallel.memory_bytes=120"
    with pytest.raises(RecipeError, match=lacking + fixes):
        take_split(slices, table, schedule, caps=[100, 100])
    assert take_split(slices, table, schedule, caps=[100, 100], activations=CHOSEN).recompute[:2] == ["full"] * 2


@pytest.mark.parametrize(
    ("placement", "layers", "message"),
    [
        (StagePlacement(5), 4, "parallel.pipeline=5 stages are more than model.layers=4; give parallel.pipeline=4 or less"),
        (
            StagePlacement(3, 2),
            5,
            r"parallel.virtual_stages=2 stages each are more than model.layers=5; give parallel.pipeline=2 or less",
        ),
        (StagePlacement(2, 3), 2, "are more than model.layers=2; give model.layers=6"),
    ],
)
def test_more_stages_than_layers_are_refused(placement: StagePlacement, layers: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        choose_split(uniform_table(layers), all_forward_then_backward(placement, 2))


def test_tables_and_splits_survive_json() -> None:
    table = random_table(random.Random(5), 6)
    assert CostTable.from_json(table.to_json()) == table
    split = choose_split(table, compute_schedule("1f1b", 3, 4))
    again = Split.from_json(split.to_json())
    assert again == split
    assert again.forecast == split.forecast


def test_ranks_that_hold_both_ends_count_tied_weights_once() -> None:
    embedding, layer = LayerCost("embedding", 0, 0, 0, state_bytes=70), LayerCost("layer", 1, 1, 1)
    table = CostTable(embedding, [layer] * 4, LayerCost("head", 0, 0, 0, state_bytes=70), "drawn", tied_bytes=70)
    for placement, expected in ((StagePlacement(2), [70, 70]), (StagePlacement(2, 2, True), [70, 0])):
        problem = Problem(table, all_forward_then_backward(placement, 1), [1.0, 1.0], None)
        pieces = next(every_split(problem))
        assert [problem.memory(r, mine) for r, mine in enumerate(by_rank(problem, pieces))] == expected


def test_a_search_that_was_given_up_is_no_proof_that_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    table, schedule = uniform_table(8, state=10, activation=1), compute_schedule("1f1b", 4, 4)
    tight = choose_split(table, schedule, caps=[30, 30, 30, 30])
    assert counts(tight) == [2, 2, 2, 2]
    monkeypatch.setattr(choose, "solve", lambda problem, work=1: solve(problem, 1))
    said = refusal(table, schedule, [30, 30, 30, 30])
    assert "found no split that fits" in said
    listed = re.search(r"; give parallel\.balance=\[([\d,]+)\] parallel\.memory_bytes=([\d,]+), which is near and fits", said)
    assert listed
    wanted, caps = [int(one) for one in listed[1].split(",")], [int(listed[2])] * 4
    edges = [sum(wanted[:stage]) for stage in range(5)]
    slices = [LayerSlice.of_layers(range(start, stop)) for start, stop in pairwise(edges)]
    assert take_split(slices, table, schedule, caps=caps).slices == slices
