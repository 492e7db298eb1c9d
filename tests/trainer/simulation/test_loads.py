"""The loads of experts in a trace: balanced, skewed by a figure, or of a run."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bagualu.comm.errors import RecipeError
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.run import train
from bagualu.trainer.simulation.loads import MOST_CLASSES, GivenLoads, balanced, by_layer, divide, in_classes, read_shares, skewed
from tests.harness import run

MODEL = ModelConfig(layers=4, moe=MoEConfig(experts=64, top_k=2, ffn=32, every=2))


@given(st.integers(1, 300), st.data())
def test_the_fullest_of_skewed_experts_has_the_given_times_the_mean(experts: int, data: st.DataObject) -> None:
    ratio = data.draw(st.floats(1, experts))
    shares = skewed(experts, ratio)
    assert sum(shares) == pytest.approx(1)
    assert shares[0] * experts == pytest.approx(ratio)
    fall = [after / before for before, after in pairwise(shares) if before > 1e-200]
    assert fall == pytest.approx(fall[:1] * len(fall))


def test_rows_are_divided_into_whole_numbers() -> None:
    assert divide(10, [0.5, 0.25, 0.25]) == [5, 3, 2]
    assert sum(divide(1001, skewed(64, 17))) == 1001


@pytest.mark.parametrize("rank", [0, 1, 999])
def test_a_rank_receives_its_share_of_few_rows_of_many_ranks(rank: int) -> None:
    """Each of 1,000 ranks sends 32 rows, which cannot be spread over 1,000 experts."""
    counts = torch.zeros(1000)
    sent, received, here = GivenLoads(balanced(1000)).exchanged(counts, counts.view(1000, 1), 32, group_of(rank, 1000))
    assert (sum(sent), sum(received), here) == (32, 32, [32])
    assert (len(sent), len(received), max(received)) == (1000, 1000, 1)


def test_rows_that_are_sent_are_received() -> None:
    shares, size = skewed(8, 3), 4
    loads, counts = GivenLoads(shares), torch.zeros(8)
    exchanged = [loads.exchanged(counts, counts.view(size, 2), 1000, group_of(rank, size)) for rank in range(size)]
    assert sum(sum(received) for _, received, _ in exchanged) == sum(sum(sent) for sent, _, _ in exchanged) == 4000
    for rank, (_, received, here) in enumerate(exchanged):
        assert sum(received) == sum(here)
        assert here == [pytest.approx(4000 * share, abs=1) for share in shares[2 * rank : 2 * rank + 2]]


def group_of(rank: int, size: int) -> Any:
    """What stands for the group of `size` ranks on `rank`."""
    return SimpleNamespace(rank=rank, size=size, read=lambda tensor: [0.0] * tensor.numel())


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("skewed:0.5", "from 1 to 64 times the mean load, not 0.5"),
        ("skewed:65", "from 1 to 64 times the mean load, not 65"),
        ("skewed:much", "skewed:1.5"),
        ("/no/run", "has no loads of experts"),
    ],
)
def test_loads_that_cannot_be_are_refused(text: str, fix: str) -> None:
    with pytest.raises(RecipeError, match=fix):
        read_shares(text, MODEL)


def test_many_expert_ranks_are_put_into_few_classes() -> None:
    shares = by_layer(skewed(64, 5), MODEL)
    few = in_classes(shares, 32)
    for layer in (1, 3):
        by_rank = [tuple(few[layer][2 * rank : 2 * rank + 2]) for rank in range(32)]
        assert len(set(by_rank)) == MOST_CLASSES
        assert list(by_rank[0]) == shares[layer][:2]
        assert sum(few[layer]) == pytest.approx(1)
        assert by_rank == sorted(by_rank, key=sum, reverse=True)
    assert in_classes(shares, 8) == shares
    assert in_classes(by_layer(None, MODEL), 32) == by_layer(None, MODEL)


def test_the_loads_of_a_run_are_those_of_its_last_validation(tmp_path: Path) -> None:
    words = ["data.source=random", "data.sequence_length=32", "data.global_batch=8", "log.progress=off", "checkpoint.every=0"]
    layout = ["parallel.data=2", "parallel.expert=2", "parallel.pipeline=2", "parallel.tensor=2", "train.validation_sequences=8"]
    recipe = compose(["recipe=moe_tiny", *words, *layout, "train.steps=2", "train.validate_every=1", f"run.dir={tmp_path}"])
    summary = run("simulated", 8, lambda communicator: train(recipe, communicator))[0]
    shares = read_shares(str(tmp_path), recipe.model)
    assert sorted(shares) == [0, 1, 2, 3]
    tokens = 8 * 32 * recipe.model.moe.top_k
    for layer, counts in summary["expert_loads"].items():
        assert sum(counts) == tokens
        assert shares[int(layer)] == [count / tokens for count in counts]
    fullest = max(max(counts) for counts in summary["expert_loads"].values())
    assert summary["expert_imbalance"] == pytest.approx(fullest * 4 / tokens)
    with pytest.raises(RecipeError, match="give the directory of a run of the same model"):
        read_shares(str(tmp_path), MODEL)
