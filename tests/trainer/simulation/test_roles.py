"""A role's trace is that of each of its ranks, composed of few passes or traced as a whole."""

from collections import Counter
from typing import Any

import pytest

from bagualu.comm.calls import Communication, Pending, Waited
from bagualu.comm.errors import RecipeError
from bagualu.parallel.pipeline.registry import SCHEDULES
from bagualu.parallel.simulation.events import Allocation, Free, Operator, RankTrace
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.roles import trace_world
from bagualu.trainer.simulation.trace import Traced, trace
from tests.parallel.simulation.held import peak

SMALL = ["data.source=random", "data.sequence_length=32", "train.micro_batch=1", "model.hidden=48", "model.ffn=96"]


def recipe_of(name: str, *words: str) -> Recipe:
    return compose([f"recipe={name}", *SMALL, *words])


def sections_of(traced: RankTrace) -> list[Any]:
    """The actions and phases with their events: blocks of memory by their kind, and outside the program no operators on a few
    numbers and no memory, since the batches and the count of labels are as many as the micro-batches."""
    found = []
    for section in traced.sections:
        events: list[Any] = []
        for event in section.events:
            if isinstance(event, Operator) and not section.action and event.read_bytes + event.written_bytes <= 4096:
                continue
            if not isinstance(event, Allocation | Free):
                events.append(event)
            elif section.action:
                events.append((type(event), traced.kinds[event.block], event.bytes))
        if events:
            found.append((section.action or section.phase, events))
    return found


CUBE = ["parallel.pipeline=4", "parallel.data=2", "parallel.tensor=2", "data.global_batch=14"]
PAIR = ["parallel.pipeline=2", "parallel.data=2", "data.global_batch=28", "model.layers=4"]
KEPT, SMALL_BUCKETS = "parallel.memory_bytes=5000000", "parallel.bucket_bytes=20000"
KEPT_BY_GPIPE = "parallel.memory_bytes=10000000"
"""Which keeps the activations of all micro-batches, 9.9 MB."""


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([*CUBE, "parallel.schedule=1f1b", "model.layers=8", "parallel.sequence=true"], marks=pytest.mark.slow),
        [*CUBE, "parallel.schedule=1f1b", "model.layers=7", "train.recompute=every:2", "parallel.zero=2"],
        pytest.param([*CUBE, "parallel.schedule=zb_h1", "model.layers=8", "model.tie_embeddings=true"], marks=pytest.mark.slow),
        pytest.param([*CUBE, "parallel.schedule=interleaved_1f1b", "model.layers=8"], marks=pytest.mark.slow),
        [*CUBE, "parallel.schedule=zb_v", "model.layers=8", "parallel.zero=0"],
        [*CUBE, "parallel.schedule=1f1b", "model.layers=8", "parallel.balance=[1.5,2.5,2.5,1.5]", "train.recompute=attention"],
        [*PAIR, "parallel.schedule=zb_v", "parallel.zero=3", "parallel.balance=[1,1.5,0.5,1]"],
        ["parallel.data=2", "data.global_batch=18", "parallel.zero=3", "train.recompute=full"],
        ["parallel.data=2", "data.global_batch=18", "parallel.zero=3", KEPT, "model.layers=4"],
        *(
            pytest.param([*PAIR, f"parallel.schedule={schedule}", *more], marks=pytest.mark.slow)
            for schedule in SCHEDULES
            for more in (
                ["parallel.zero=2"],
                ["parallel.zero=2", SMALL_BUCKETS],
                ["parallel.zero=3"],
                ["parallel.zero=3", KEPT_BY_GPIPE if schedule == "gpipe" else KEPT],
            )
        ),
    ],
)
def test_a_composed_step_is_the_step_that_is_traced_as_a_whole(words: list[str]) -> None:
    recipe = recipe_of("tiny_dense", *words)
    world = recipe.world_size()
    roles = trace_world(recipe, world)
    assert sum(role.ranks for role in roles) == world
    for role in roles:
        whole = trace(recipe, world, role.trace.rank)
        for ours, wholes in zip(sections_of(role.trace), sections_of(whole), strict=True):
            assert ours == wholes
        assert role.trace.flops() == whole.flops()
        assert peak(role.trace).bytes == pytest.approx(peak(whole).bytes, rel=0.01)


def test_a_step_of_many_micro_batches_is_composed_of_few() -> None:
    recipe = recipe_of("tiny_dense", "parallel.data=2", "data.global_batch=400", "parallel.zero=3")
    (role,) = trace_world(recipe, 2)
    passes = [section for section in role.trace.sections if section.action]
    assert len(passes) == 400
    assert len({id(section.events) for section in passes}) < 20


def test_a_composed_step_waits_for_every_call_once() -> None:
    recipe = recipe_of("tiny_dense", "parallel.pipeline=4", "parallel.data=2", "parallel.zero=3", "data.global_batch=18")
    for role in trace_world(recipe, 8):
        pending, under_way = Pending[int](), set[int]()
        for number, (_, event) in enumerate(role.trace.events()):
            if isinstance(event, Communication):
                pending.begin(event, number)
                under_way.add(number)
            elif isinstance(event, Waited):
                under_way.remove(pending.end(event))
        assert not under_way


def test_ranks_whose_experts_get_more_rows_have_a_role_of_their_own() -> None:
    recipe = recipe_of("moe_tiny", "parallel.data=4", "parallel.expert=2", "data.global_batch=8")
    even, uneven = trace_world(recipe, 4), trace_world(recipe, 4, Traced(shares=[0.4, 0.3, 0.2, 0.1]))
    assert [role.ranks for role in even] == [4]
    assert [role.ranks for role in uneven] == [2, 2]
    assert [role.coordinates for role in even + uneven] == [(range(4),), (range(0, 4, 2),), (range(1, 4, 2),)]
    more, fewer = (role.trace.flops() for role in uneven)
    assert more > even[0].trace.flops() > fewer


def test_layers_whose_experts_have_other_loads_are_traced_apart() -> None:
    recipe = recipe_of("moe_tiny", "parallel.pipeline=4", "parallel.data=2", "parallel.expert=2", "data.global_batch=8")
    fuller = [0.4, 0.4, 0.1, 0.1]
    roles = trace_world(recipe, 8, Traced(shares={0: fuller, 1: fuller[::-1], 2: fuller, 3: fuller}))
    expected = trace_world(recipe, 8, Traced(shares=fuller))
    flops = {(role.pipeline, role.coordinates): role.trace.flops() for role in roles}
    uniform = {(role.pipeline, role.coordinates): role.trace.flops() for role in expected}
    first, second = ((range(0, 2, 2),), (range(1, 2, 2),))
    for pipeline in range(4):
        other = second if pipeline == 1 else first
        assert flops[pipeline, first] == uniform[pipeline, other]
    assert uniform[1, first] > uniform[1, second]


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


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["train.offload_bytes=1000000"], "train.offload_bytes=0"),
        (["optim.name=muon"], "optim.name=adamw"),
        (["parallel.shares=measured"], "number of micro-batches"),
        (["parallel.engine=deepspeed", "parallel.zero=2"], "parallel.engine=native parallel.zero=2"),
    ],
)
def test_what_cannot_be_traced_is_refused_with_what_can(words: list[str], fix: str) -> None:
    with pytest.raises(RecipeError, match=fix):
        trace(recipe_of("tiny_dense", *words), 1, 0)
