"""The recipe for fewer workers."""

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.launch.workers.elastic_layout import fitted, with_layout
from bagualu.parallel.layout import Layout
from bagualu.trainer.recipe.compose import compose


def fit(ranks, *overrides):
    recipe, used = fitted(compose(["recipe=tiny", "restart.elastic=true", *overrides]), ranks)
    layout = recipe.validate(used)
    return layout.data, layout.tensor, layout.pipeline, used


def test_enough_workers_leave_the_recipe_as_it_is():
    recipe = compose(["recipe=tiny"])
    assert fitted(recipe, recipe.world_size()) == (recipe, recipe.world_size())
    assert fitted(recipe, recipe.world_size() + 1) == (recipe, recipe.world_size())


def test_replicas_go_first_and_the_global_batch_stays():
    base = ["launch.workers=4", "parallel.data=2", "parallel.tensor=2", "parallel.pipeline=1", "data.global_batch=8"]
    assert fit(3, *base) == (1, 2, 1, 2)
    assert fit(1, *base) == (1, 1, 1, 1)
    recipe, _ = fitted(compose(["recipe=tiny", "restart.elastic=true", *base]), 2)
    assert recipe.data.global_batch == 8


def test_a_batch_that_does_not_divide_over_three_takes_two():
    base = ["launch.workers=4", "parallel.data=4", "parallel.tensor=1", "parallel.pipeline=1", "data.global_batch=8"]
    assert fit(3, *base) == (2, 1, 1, 2)


def test_sequence_parallel_goes_with_the_last_tensor_rank():
    base = ["launch.workers=2", "parallel.data=1", "parallel.tensor=2", "parallel.pipeline=1", "parallel.expert=1",
            "parallel.sequence=true"]  # fmt: skip
    recipe, used = fitted(compose(["recipe=tiny", "restart.elastic=true", *base]), 1)
    assert (used, recipe.parallel.sequence) == (1, False)


def test_lists_by_rank_do_not_outlive_their_ranks():
    base = ["launch.workers=4", "model.layers=6", "model.moe.every=2", "parallel.data=1", "parallel.pipeline=4",
            "parallel.expert=1", "parallel.balance=[1,2,2,1]", "parallel.rebalance.every=5",
            "parallel.memory_bytes=[5000000000,6000000000,6000000000,6000000000]"]  # fmt: skip
    recipe, used = fitted(compose(["recipe=tiny", "restart.elastic=true", *base]), 3)
    assert (used, recipe.parallel.balance, recipe.parallel.memory_bytes) == (3, "uniform", 5000000000)
    recipe, used = fitted(compose(["recipe=tiny", "restart.elastic=true", *base]), 1)
    assert (used, recipe.parallel.rebalance.every) == (1, None)


def test_shares_of_data_ranks_stay_while_their_number_does():
    words = ["recipe=tiny_dense", "restart.elastic=true", "parallel.pipeline=2", "launch.workers=4", "data.global_batch=16",
             "parallel.shares=[5,11]", "train.micro_batch=1"]  # fmt: skip
    recipe = compose(words)
    assert with_layout(recipe, Layout(data=2)).parallel.shares == [5, 11]
    assert with_layout(recipe, Layout(data=1, pipeline=2)).parallel.shares is None


def test_layers_that_all_lie_on_one_rank_are_not_balanced():
    base = ["launch.workers=2", "parallel.data=1", "parallel.pipeline=2", "parallel.expert=1", "parallel.balance=measured",
            "parallel.speeds=measured"]  # fmt: skip
    recipe, used = fitted(compose(["recipe=tiny", "restart.elastic=true", *base]), 1)
    assert (used, recipe.parallel.balance, recipe.parallel.speeds) == (1, "uniform", None)


def test_too_few_are_refused_with_the_fix():
    with pytest.raises(RecipeError, match=r"1 workers are left of 4.*restart.min_workers=1"):
        fit(1, "launch.workers=4", "parallel.data=4", "parallel.pipeline=1", "restart.min_workers=2")


def test_ranks_that_would_not_fit_their_memory_are_not_left():
    words = ["recipe=tiny_dense", "restart.elastic=true", "parallel.data=4", "parallel.zero=3", "train.micro_batch=1"]
    for limit, used in ((37_000_000, 2), (10**9, 1)):
        recipe = compose([*words, f"parallel.memory_bytes={limit}"])
        assert fitted(recipe, 2)[1] == 2
        if used == 1:
            assert fitted(recipe, 1)[1] == 1
        else:
            with pytest.raises(RecipeError, match=r"1 workers are left of 4.*parallel.zero=3"):
                fitted(recipe, 1)


def test_a_part_of_the_data_ranks_shares_weights_while_it_divides_them():
    recipe = compose(["recipe=tiny_dense", "restart.elastic=true", "parallel.data=8", "parallel.pipeline=1", "parallel.engine=fsdp",
                      "parallel.shard=4", "data.global_batch=8", "train.micro_batch=1"])  # fmt: skip
    assert with_layout(recipe, Layout(data=4)).parallel.shard == 4
    assert with_layout(recipe, Layout(data=2)).parallel.shard is None
    assert fitted(recipe, 5)[1] == 4


FOUR = ("launch.workers=4", "parallel.pipeline=1", "data.global_batch=12", "train.micro_batch=1", "comm.backend=gloo",
        "train.dtype=float32")  # fmt: skip


@pytest.mark.parametrize(
    ("words", "layout"),
    [
        *((f"parallel.engine=deepspeed parallel.zero={zero}", (3, 1, 1, 3)) for zero in (1, 2, 3)),
        ("parallel.engine=deepspeed parallel.zero=3 parallel.data=2 parallel.tensor=2", (1, 2, 1, 2)),
        ("parallel.engine=deepspeed parallel.zero=1 parallel.data=2 parallel.pipeline=2", (1, 1, 2, 2)),
        ("parallel.engine=deepspeed parallel.zero=1 parallel.shares=[2,2,3,5]", (3, 1, 1, 3)),
        ("parallel.engine=deepspeed parallel.zero=2 data.global_batch=8", (2, 1, 1, 2)),
        ("parallel.engine=fsdp", (3, 1, 1, 3)),
        ("parallel.engine=fsdp parallel.shard=2", (3, 1, 1, 3)),
        ("parallel.engine=fsdp parallel.data=2 parallel.pipeline=2", (1, 1, 2, 2)),
    ],
)
def test_three_of_four_workers_take_a_layout_that_their_engine_can_run(words: str, layout: tuple[int, int, int, int]) -> None:
    base = ["recipe=tiny_dense", "restart.elastic=true", *FOUR, *words.split()]
    before = compose(base)
    assert before.validate(4).world == 4
    recipe, used = fitted(before, 3)
    taken = recipe.validate(used)
    assert (taken.data, taken.tensor, taken.pipeline, used) == layout
    assert (recipe.parallel.engine, recipe.parallel.zero_stage) == (before.parallel.engine, before.parallel.zero_stage)


@pytest.mark.parametrize("zero", [1, 2])
def test_experts_of_a_deepspeed_engine_stay_divided(zero: int) -> None:
    words = ["recipe=tiny", "restart.elastic=true", *FOUR, "parallel.data=4", "parallel.expert=2", "parallel.engine=deepspeed",
             f"parallel.zero={zero}"]  # fmt: skip
    recipe, used = fitted(compose(words), 3)
    layout = recipe.validate(used)
    assert (used, layout.data, layout.expert) == (2, 2, 2)
