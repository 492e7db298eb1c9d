"""What a recipe says about its failures: the state that it saves, who writes it, what is answered."""

from dataclasses import replace

import pytest

from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.trainer.assemble import assemble
from bagualu.trainer.costs.state import checkpoint_bytes
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.failures import FailureQuestion, failure_report, run_length, settings_of, workload
from tests.harness import run
from tests.parity import small_recipe

MIXTURE = {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2}
H100 = load_cluster("h100")


def written(communicator: Communicator, recipe: Recipe) -> int:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    return sum(piece.tensor.nbytes for piece in state.engine.pieces())


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {"train__dtype": "bfloat16", "model__tie_embeddings": True}),
        (2, {"parallel__data": 2, "optim__name": "muon", "model__tie_embeddings": False}),
        (2, {"parallel__data": 2, "parallel__zero": 0, **MIXTURE}),
        (4, {"parallel__data": 2, "parallel__tensor": 2, "optim__moments_dtype": "bfloat16", "train__dtype": "bfloat16"}),
        (4, {"parallel__data": 4, "parallel__engine": "fsdp", "parallel__shard": 2, "parallel__bucket_bytes": 26214400}),
    ],
    ids=str,
)
def test_a_checkpoint_holds_what_is_computed_and_is_written_by_as_many_ranks(ranks, changes):
    recipe = small_recipe(**changes)
    layout = recipe.validate(ranks)
    parts = run("gloo" if recipe.parallel.engine == "fsdp" else "simulated", ranks, written, recipe)
    assert sum(parts) == checkpoint_bytes(work_of(recipe, layout))
    work = workload(recipe, layout, 1.0)
    assert work.state_bytes == sum(parts)
    if not recipe.model.moe.experts:
        assert sum(part > sum(parts) / ranks / 10 for part in parts) == work.writers


def asked(recipe, world, cluster=H100, **question):
    layout = recipe.validate(world)
    return failure_report(recipe, cluster.for_world(world), layout, 10.0, FailureQuestion(**question))


def big(*words):
    return compose(["recipe=llama3_8b", "parallel.data=64", "comm.backend=nccl", "data.global_batch=1024", *words])


def test_the_layout_and_the_settings_are_those_of_the_recipe():
    recipe = big("checkpoint.every=50", "restart.hang_seconds=120", "comm.timeout_seconds=900")
    layout = recipe.validate(512)
    work = workload(recipe, layout, 10.0)
    assert (work.world, work.replicas, work.micro_batches, work.equal_shares) == (512, 64, 16, True)
    assert work.state_bytes == pytest.approx(8.03e9 * 12, rel=0.01)
    settings = settings_of(recipe)
    assert (settings.checkpoint.every, settings.hang_seconds) == (50, 120)


def test_the_same_question_has_the_same_answer():
    report = asked(big(), 512, days=3.0)
    assert report.lines() == asked(big(), 512, days=3.0).lines()
    assert report.lines()[0].startswith("failures ")
    assert " in 3 days" in report.lines()[0]


def test_a_cluster_without_failure_rates_is_passed_over_unless_they_were_asked_for():
    silent = replace(H100, parts=(replace(H100.parts[0], failures_per_device_hour={}),))
    assert asked(big(), 512, silent) is None
    assert asked(big(), 512, replace(H100, storage=None)) is None
    with pytest.raises(RecipeError, match="has no failures_per_device_hour"):
        asked(big(), 512, silent, asked=True)


def length(recipe, **question):
    return run_length(recipe, H100.for_world(512), recipe.validate(512), 10.0, FailureQuestion(**question))


def test_as_many_steps_are_advised_as_fit_into_the_time_with_failures():
    recipe, steps = big(), 14 * 86400 / 10.0
    short, long, report = length(recipe, days=7), length(recipe, days=14), asked(recipe, 512, days=14)
    assert 0.98 * report.at_best.progress.low * steps < long.steps < report.at_best.progress.mean * steps
    assert 1.9 < long.steps / short.steps < 2.2
    assert long.checkpoint_steps == report.best.longest
    assert report.at_best.ratio.mean - 0.003 < long.effective.mean < report.at_best.ratio.mean


def test_an_interval_that_the_user_gave_stays_and_costs_steps():
    rare = big("checkpoint.every=2000")
    own, best = length(rare, days=14, own_interval=True), length(rare, days=14)
    assert (own.checkpoint_steps, best.checkpoint_steps < 2000) == (2000, True)
    assert own.steps < best.steps


def test_the_launch_may_restart_as_often_as_is_needed():
    often, rarely = (length(big("restart.limit=3"), days=days) for days in (60, 0.01))
    assert often.restart_limit > asked(big(), 512, days=60).time.failures.high
    assert rarely.restart_limit == 3


def test_a_time_shorter_than_a_step_is_refused():
    with pytest.raises(RecipeError, match=r"days=0\.0001 is shorter than a step of 10 s; give more days"):
        length(big(), days=0.0001)
