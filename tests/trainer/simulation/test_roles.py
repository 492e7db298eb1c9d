"""A role's trace is that of each of its ranks, composed of few passes or traced as a whole."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from bagualu.comm.calls import Communication
from bagualu.comm.errors import RecipeError
from bagualu.parallel.simulation.events import Operator, RankTrace
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.loads import divide, skewed
from bagualu.trainer.simulation.roles import trace_world
from bagualu.trainer.simulation.trace import Traced, trace

SMALL = ["data.source=random", "data.sequence_length=32", "train.micro_batch=1", "model.hidden=48", "model.ffn=96"]


def recipe_of(name: str, *words: str) -> Recipe:
    return compose([f"recipe={name}", *SMALL, *words])


def sections_of(traced: RankTrace) -> list[Any]:
    """The actions and phases, each with its communications and operators, but those on a few numbers: some of these have one for
    each micro-batch, as the count of labels and the checksum of checksums."""
    found = []
    for section in traced.sections:
        operators = [event for event in section.events if isinstance(event, Operator)]
        operators = [operator for operator in operators if operator.read_bytes + operator.written_bytes > 512]
        calls = [replace(event, number=0) for event in section.events if isinstance(event, Communication)]
        if operators or calls:
            found.append((section.action or section.phase, Counter(operators), calls))
    return found


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["parallel.schedule=1f1b", "model.layers=8", "parallel.sequence=true"], marks=pytest.mark.slow),
        ["parallel.schedule=1f1b", "model.layers=7", "train.recompute=every:2", "parallel.zero=2"],
        pytest.param(["parallel.schedule=zb_h1", "model.layers=8", "model.tie_embeddings=true"], marks=pytest.mark.slow),
        pytest.param(["parallel.schedule=interleaved_1f1b", "model.layers=8"], marks=pytest.mark.slow),
        ["parallel.schedule=zb_v", "model.layers=8", "parallel.zero=0"],
    ],
)
def test_a_composed_step_is_the_step_that_is_traced_as_a_whole(words: list[str]) -> None:
    recipe = recipe_of("tiny_dense", "parallel.pipeline=4", "parallel.data=2", "parallel.tensor=2", "data.global_batch=14", *words)
    roles = trace_world(recipe, 16)
    assert [(role.pipeline, role.ranks, role.micro_batches) for role in roles] == [(rank, 4, 7) for rank in range(4)]
    for role in roles:
        whole = trace(recipe, 16, role.trace.rank)
        for ours, wholes in zip(sections_of(role.trace), sections_of(whole), strict=True):
            assert ours == wholes
        assert role.trace.flops() == whole.flops()
        assert role.trace.peak().bytes == pytest.approx(whole.peak().bytes, rel=0.01)


def test_calls_of_a_composed_step_have_numbers_of_their_own() -> None:
    recipe = recipe_of("tiny_dense", "parallel.pipeline=4", "parallel.schedule=1f1b", "data.global_batch=9")
    for role in trace_world(recipe, 4):
        numbers = [call.number for call in role.trace.calls()]
        assert numbers == list(range(len(numbers)))


def test_ranks_whose_experts_get_more_rows_have_a_role_of_their_own() -> None:
    recipe = recipe_of("moe_tiny", "parallel.data=4", "parallel.expert=2", "data.global_batch=8")
    even, uneven = trace_world(recipe, 4), trace_world(recipe, 4, Traced(shares=[0.4, 0.3, 0.2, 0.1]))
    assert [role.ranks for role in even] == [4]
    assert [role.ranks for role in uneven] == [2, 2]
    more, fewer = (role.trace.flops() for role in uneven)
    assert more > even[0].trace.flops() > fewer


def test_ranks_with_more_micro_batches_have_a_role_of_their_own() -> None:
    recipe = recipe_of("tiny_dense", "parallel.data=3", "data.global_batch=9", "parallel.shares=[5,2,2]")
    assert [(role.ranks, role.micro_batches) for role in trace_world(recipe, 3)] == [(1, 5), (2, 2)]


def test_a_large_world_takes_no_more_than_its_roles() -> None:
    words = ["parallel.data=512", "parallel.tensor=8", "parallel.pipeline=4", "parallel.schedule=1f1b", "data.global_batch=4096"]
    roles = trace_world(compose(["recipe=llama3_8b", *words, "launch.nodes=2048"]), 16384)
    assert sum(role.ranks for role in roles) == 16384
    assert [role.pipeline for role in roles] == [0, 1, 2, 3]
    assert roles[1].trace.kinds is roles[2].trace.kinds  # traced once
    names = Counter(operator.name for operator in roles[1].trace.operators())
    assert names["bagualu.rms_norm.default"] == 2 * 2 * 8 * 8  # of 8 layers and micro-batches, recomputed: no step was left out


def test_shares_of_experts() -> None:
    assert divide(10, [0.5, 0.25, 0.25]) == [5, 3, 2]
    assert sum(divide(1001, skewed(64, 1.7))) == 1001
    assert max(skewed(8, 1.5)) == pytest.approx(1.5 / 8)
    assert sum(skewed(8, 1.5)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["train.compile=true", "comm.backend=gloo"], "train.compile=false"),
        (["train.offload_bytes=1000000"], "train.offload_bytes=0"),
        (["optim.name=muon"], "optim.name=adamw"),
        (["parallel.shares=measured"], "number of micro-batches"),
        (["parallel.engine=deepspeed", "parallel.zero=2"], "parallel.engine=native parallel.zero=2"),
    ],
)
def test_what_cannot_be_traced_is_refused_with_what_can(words: list[str], fix: str) -> None:
    with pytest.raises(RecipeError, match=fix):
        trace(recipe_of("tiny_dense", *words), 1, 0)
