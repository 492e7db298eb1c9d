"""What is chosen, timed on the schedule; and what is said when nothing fits."""

import random
import re
from itertools import pairwise

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.parallel.balance.stages import choose, refine
from bagualu.parallel.balance.stages.choose import choose_split, take_split
from bagualu.parallel.balance.stages.cost import CostTable, LayerCost
from bagualu.parallel.balance.stages.forecast import Split, by_rank, forecast_split
from bagualu.parallel.balance.stages.partition import solve
from bagualu.parallel.balance.stages.problem import Problem
from bagualu.parallel.balance.stages.refine import TOLERANCE
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.parallel.pipeline.schedules.schedule import Schedule
from tests.parallel.balance.examples import all_forward_then_backward, bottleneck, every_split, random_table


def uniform_table(layers: int, head: float = 0.0, state: int = 0, activation: int = 0, kept: int = 0) -> CostTable:
    layer = LayerCost("layer", 1.0, 1.0, 1.0, state, activation, kept)
    return CostTable(LayerCost("embedding", 0, 0, 0), [layer] * layers, LayerCost("head", head, 0, 0), "drawn")


def counts(split: Split) -> list[int]:
    return [len(piece) for piece in split.slices]


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
    free = choose_split(table, schedule, caps=[400, 200], recompute="auto")  # rank 0 holds 2 micro-batches, rank 1 one
    assert (counts(free), free.recompute) == ([2, 2], [False, False])
    tight = choose_split(table, schedule, caps=[399, 200], recompute="auto")
    assert (counts(tight), tight.recompute) == ([1, 3], [False, True]) or tight.recompute == [True, False]
    assert tight.forecast is not None
    assert tight.forecast.bottleneck_seconds < 9.0  # two layers with their forward pass again, not three without
    assert tight.forecast.memory_bytes[0] <= 399


def test_the_first_stage_holds_more_micro_batches_and_so_fewer_layers_under_equal_caps() -> None:
    table, schedule = uniform_table(12, state=1, activation=10), compute_schedule("1f1b", 4, 8)
    split = choose_split(table, schedule, caps=[90] * 4)
    assert counts(split)[0] == 2  # 2 x (1 + 4 x 10) fits 90 and 3 do not
    assert split.forecast is not None
    assert all(need <= 90 for need in split.forecast.memory_bytes)


def refusal(table: CostTable, schedule: Schedule, caps: list[int], recompute: str = "none") -> str:
    """Empty where there is a split."""
    try:
        choose_split(table, schedule, caps=caps, recompute=recompute)
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
            assert bool(match[1]) == (refusal(table, schedule, caps, "auto") == "")
    assert sum("train.recompute=auto" in message for message in refused) > 5
    assert sum("=[" in message for message in refused) > 5


def test_a_list_that_does_not_fit_is_refused_and_one_that_does_is_taken() -> None:
    table, schedule = uniform_table(6, state=10, activation=10, kept=1), compute_schedule("1f1b", 2, 4)
    slices = [range(4), range(4, 6)]
    taken = take_split(slices, table, schedule, caps=[120, 120])
    assert taken.slices == slices
    lacking = r"parallel.balance=\[4,2\]: pipeline rank 0 needs 120 bytes .* allows 100; "
    fixes = "give train.recompute=auto or parallel.balance=analytic or parallel.memory_bytes=120"
    with pytest.raises(RecipeError, match=lacking + fixes):
        take_split(slices, table, schedule, caps=[100, 100])
    assert take_split(slices, table, schedule, caps=[100, 100], recompute="auto").recompute == [True, False]


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
        assert [problem.memory(r, mine, (False,) * len(mine)) for r, mine in enumerate(by_rank(problem, pieces))] == expected


def test_a_search_that_was_given_up_is_no_proof_that_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    table, schedule = uniform_table(8, state=10, activation=1), compute_schedule("1f1b", 4, 4)
    tight = choose_split(table, schedule, caps=[30, 30, 30, 30])
    assert counts(tight) == [2, 2, 2, 2]
    monkeypatch.setattr(choose, "solve", lambda problem, work=1: solve(problem, 1))
    said = refusal(table, schedule, [30, 30, 30, 30])
    assert "found no split that fits" in said
    listed = re.search(r"parallel\.balance=\[([\d,]+)\] is near and fits; give it with parallel\.memory_bytes=\[([\d,]+)\]", said)
    assert listed
    wanted, caps = ([int(one) for one in group.split(",")] for group in listed.groups())
    edges = [sum(wanted[:stage]) for stage in range(5)]
    slices = [range(start, stop) for start, stop in pairwise(edges)]
    assert take_split(slices, table, schedule, caps=caps).slices == slices
