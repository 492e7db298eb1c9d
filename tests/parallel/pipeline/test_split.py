"""Every layer on exactly one stage, in order, as evenly as can be."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bagualu.comm.errors import RecipeError
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.parallel.pipeline.split import split_layers


def halves_of(slices: list[LayerSlice]) -> list[int]:
    return [half for held in slices for half in range(held.start, held.stop)]


@given(st.integers(1, 12), st.integers(0, 40))
def test_every_layer_is_held_once_in_order_and_stages_differ_by_one_at_most(stages: int, more: int) -> None:
    layers = stages + more
    slices = split_layers(layers, StagePlacement(stages))
    assert halves_of(slices) == list(range(2 * layers))
    counts = [held.count for held in slices]
    assert max(counts) - min(counts) <= 1
    fuller = [stage for stage, count in enumerate(counts) if count > min(counts)]
    if fuller:  # together, and as far from the first stage as from the last
        assert fuller == list(range(fuller[0], fuller[-1] + 1))
        assert (stages - 1 - fuller[-1]) - fuller[0] in (0, 1)


def test_thirty_layers_on_four_stages_are_thirty() -> None:
    assert [held.count for held in split_layers(30, StagePlacement(4))] == [7, 8, 8, 7]


@given(st.lists(st.integers(1, 10), min_size=1, max_size=6))
def test_a_list_is_followed_also_into_layers(halves: list[int]) -> None:
    assume(sum(halves) % 2 == 0 and sum(halves) >= 2 * len(halves))
    counts = [half / 2 for half in halves]
    slices = split_layers(int(sum(counts)), StagePlacement(len(counts)), counts)
    assert [held.count for held in slices] == counts
    assert halves_of(slices) == list(range(sum(halves)))


@pytest.mark.parametrize(
    ("layers", "stages", "balance", "message"),
    [
        (4, 5, "uniform", "parallel.pipeline=5 stages are more than model.layers=4; give parallel.pipeline=4 or less"),
        (8, 3, [3, 3, 3], r"must hold 3 positive counts of layers, .* add up to model.layers=8; e.g. parallel.balance=\[3,3,2\]"),
        (8, 3, [4, 4], r"must hold 3 positive counts .* e.g. parallel.balance=\[3,3,2\]"),
        (8, 3, [8, 0, 0], r"must hold 3 positive counts"),
        (8, 3, [9, -2, 1], r"must hold 3 positive counts"),
        (8, 3, [], r"must hold 3 positive counts"),
        (8, 3, "even", "parallel.balance=even is unknown; give uniform, analytic, measured or a list of 3 layer counts"),
        (8, 3, 3, "parallel.balance=3 is unknown; give uniform, analytic, measured or a list of 3 layer counts"),
        (8, 3, None, "parallel.balance=None is unknown"),
        (8, 2, [4.25, 3.75], r"must hold 2 positive counts of layers, whole or halves such as 1.5"),
        (8, 2, [4.5, 4.5], r"must hold 2 positive counts"),
        (8, 2, [float("nan"), 4.0], r"must hold 2 positive counts"),
        (8, 2, [float("inf"), 4.0], r"must hold 2 positive counts"),
        (8, 2, [True, 7], "is unknown"),
    ],
)
def test_what_cannot_be_is_refused_with_one_that_can(layers: int, stages: int, balance: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        split_layers(layers, StagePlacement(stages), balance)


@pytest.mark.parametrize("v_shaped", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2])
def test_uniform_is_even_by_rank(ranks: int, chunks: int, v_shaped: bool) -> None:
    placement = StagePlacement(ranks, chunks, v_shaped and chunks == 2)
    for layers in range(placement.stages, 3 * placement.stages + 1):
        slices = split_layers(layers, placement)
        assert halves_of(slices) == list(range(2 * layers))
        totals = [sum(slices[stage].count for stage in placement.stages_of(rank)) for rank in range(ranks)]
        assert max(totals) - min(totals) <= 1
        assert not placement.v_shaped or totals[0] == min(totals), "embedding and head are there"


def test_several_stages_of_a_rank_are_counted_together() -> None:
    assert [held.count for held in split_layers(10, StagePlacement(2, 2))] == [2, 3, 3, 2]
    assert [held.count for held in split_layers(10, StagePlacement(2, 2), [1, 2, 3, 4])] == [1, 2, 3, 4]
    assert [held.count for held in split_layers(10, StagePlacement(4, 2, v_shaped=True))] == [1, 1, 2, 2, 1, 1, 1, 1]
    message = "parallel.virtual_stages=2 stages each are more than model.layers=7; give parallel.pipeline=3 or less"
    with pytest.raises(RecipeError, match=message):
        split_layers(7, StagePlacement(4, 2))
    with pytest.raises(RecipeError, match=r"give model\.layers=4"):
        split_layers(1, StagePlacement(2, 2))
