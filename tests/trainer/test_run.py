"""Whole runs through `train`: stopping, going on, being killed, diverging, and having nothing left to do."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import latest, list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointStorageError
from bagualu.fault_tolerance.checkpoint.reading.inspect import describe, verify
from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH, Fence
from bagualu.fault_tolerance.ledger.events import read
from bagualu.parallel import precision
from bagualu.parallel import product_shapes as shapes
from bagualu.parallel.config import ParallelConfig
from bagualu.trainer import loop
from bagualu.trainer import run as whole_run
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.models.decoder import initialise
from bagualu.trainer.process.failure import GuardError
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recovery.saving import take_checkpoints
from bagualu.trainer.step import StepResult, train_step
from tests.conftest import Undisturbed
from tests.harness import ON_GPU, run
from tests.parity import small_recipe
from tests.standing import assert_stood, figures, go_on, train_noting_samples
from tests.trainer.faults import Records

STEPS = 6
TIMINGS = {"step_seconds", "data_seconds", "tokens_per_second", "mfu", "checkpoint_seconds", "new_shapes"}
MOE = {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2, "model__layers": 4, "parallel__expert": 2}


def recipe_in(folder: Path, **changes: object) -> Recipe:
    defaults: dict[str, object] = {
        "run__dir": str(folder), "train__steps": STEPS, "train__validate_every": 4, "train__validation_sequences": 3,
        "log__progress": "off", "checkpoint__every": 2, "parallel__data": 2, "data__global_batch": 4, "model__layers": 2,
    }  # fmt: skip
    return small_recipe(**{**defaults, **changes})


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_saved(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints")]


def until(communicator: Communicator, recipe: Recipe, rank: int, stop_at: int) -> dict[str, Any]:
    """A run; `rank` alone is asked to stop during step `stop_at` (from 1)."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return communicator.rank == rank and asked == stop_at

    return train_noting_samples(recipe, communicator, stop)


def trained(communicator: Communicator, recipe: Recipe) -> dict[str, Any]:
    return whole_run.train(recipe, communicator)


@pytest.mark.parametrize("begins_with", ["fsdp", "native"])
def test_summary_checkpoints_and_ledger_say_which_engine_ran(tmp_path: Path, begins_with: str) -> None:
    engines = {"fsdp": ("fsdp", 3, "fsdp"), "native": ("native", 2, "native, ZeRO-2")}
    kinds = [engines.pop(begins_with), *engines.values()]
    for start, (engine, zero, _) in enumerate(kinds):
        kind = {"parallel__engine": engine, "parallel__zero": zero, "parallel__bucket_bytes": ParallelConfig.bucket_bytes}
        recipe = recipe_in(tmp_path, **kind, train__steps=2 * start + 2)
        recipe.checkpoint.resume = start > 0
        summary, _ = run("gloo", 2, trained, recipe)
        assert (summary["engine"], summary["zero"]) == (engine, zero)
    saved = [describe(path)["metadata"] for path in list_checkpoints(tmp_path / "checkpoints")]
    assert [(metadata["engine"], metadata["zero"]) for metadata in saved] == [kind[:2] for kind in kinds]
    assert [event.engine for event in read(tmp_path) if event.what == "joined"] == [kind[2] for kind in kinds]


STOPPED = {"dense": {"parallel__pipeline": 2}, "moe": MOE}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("moe", "gloo"),
        ("dense", "simulated"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("dense", "gloo"), ("moe", "simulated"))),
        *(pytest.param(name, *ON_GPU.values, marks=ON_GPU.marks) for name in STOPPED),
    ],
)
def test_a_stop_on_one_rank_stops_all_and_going_on_completes_the_same_run(
    tmp_path: Path, undisturbed: Undisturbed, backend: str, name: str
) -> None:
    stopped = recipe_in(tmp_path / "stopped", **STOPPED[name])
    straight, world = undisturbed(stopped, backend), stopped.world_size()
    expected = json.loads((straight / "summary.json").read_text())
    assert expected["ended"] == "done"
    assert [line["step"] for line in metrics(straight)] == list(range(1, STEPS + 1))

    summaries = run(backend, world, until, stopped, world - 1, 3)
    assert {(summary["ended"], summary["step"]) for summary in summaries} == {("stopped", 3)}
    assert steps_saved(tmp_path / "stopped") == [2, 3]
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text()) == summaries[0]
    assert figures(tmp_path / "stopped") == figures(straight)[:3]

    stopped.checkpoint.resume = True
    summaries = run(backend, world, until, stopped, -1, 0)
    assert {(summary["ended"], summary["step"]) for summary in summaries} == {("done", STEPS)}
    assert_stood(tmp_path / "stopped", straight, 0)
    same = ("loss", "grad_norm", "lr", "tokens", "validation_loss", "parameters", "layout")
    assert {key: summaries[0][key] for key in same} == {key: expected[key] for key in same}


def test_a_mixture_stops_meeting_new_shapes_of_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_CPU_MULTIPLIES", {torch.bfloat16: True})
    monkeypatch.setattr(shapes, "_met", set())
    run("simulated", 2, until, recipe_in(tmp_path, **MOE, train__dtype="bfloat16"), -1, 0)
    new = [line["new_shapes"] for line in metrics(tmp_path)]
    assert new[0] > 0
    assert not any(new[2:])


def test_the_numbers_are_there_and_right(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, **MOE)
    summary = run("simulated", 2, until, recipe, -1, 0)[0]
    lines = metrics(tmp_path)
    tokens = recipe.data.global_batch * recipe.data.sequence_length
    for line in lines:
        assert {"step", "loss", "grad_norm", "lr", "tokens", "balance_loss", *TIMINGS} <= line.keys()
        assert line["tokens"] == line["step"] * tokens
        assert line["tokens_per_second"] == pytest.approx(tokens / line["step_seconds"])
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * summary["flops_per_token"] / 2e9)
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 6]
    assert 2 <= lines[0]["balance_loss"] < 4  # two mixtures, near even
    assert summary["validation_loss"] == lines[-1]["validation_loss"]
    assert summary["checkpoint"].endswith("step-00000006")


def test_what_a_sink_waits_for_at_the_end_is_no_time_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[tuple[str, bool]] = []

    class Slow(Records):
        def close(self) -> None:
            closed.append((read(tmp_path)[-1].what, (tmp_path / "summary.json").exists()))

    monkeypatch.setattr(whole_run, "_sinks", lambda *_: [Slow()])
    run("simulated", 1, until, recipe_in(tmp_path, parallel__data=1), -1, 0)
    assert closed == [("ended", True)]


def test_a_stop_during_the_last_step_is_a_run_that_is_done(tmp_path: Path) -> None:
    summary = run("simulated", 2, until, recipe_in(tmp_path), 0, STEPS)[0]
    assert summary["ended"] == "done"
    assert "validation_loss" in summary


def killed(communicator: Communicator, recipe: Recipe, at: int) -> str:
    """A run whose process dies when it is to begin step `at` (from 1)."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == at:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        train_noting_samples(recipe, communicator, stop)
    return "killed"


def test_steps_done_again_after_a_kill_are_recorded_once(tmp_path: Path, undisturbed: Undisturbed) -> None:
    run("simulated", 2, killed, recipe_in(tmp_path / "killed"), 6)
    assert [line["step"] for line in metrics(tmp_path / "killed")] == [1, 2, 3, 4, 5]
    assert steps_saved(tmp_path / "killed") == [2, 4]
    run("simulated", 2, until, recipe_in(tmp_path / "killed", checkpoint__resume=True), -1, 0)
    assert_stood(tmp_path / "killed", undisturbed(recipe_in(tmp_path), "simulated"), 2)


def test_another_layout_goes_on_with_the_same_run(tmp_path: Path, undisturbed: Undisturbed) -> None:
    straight = undisturbed(recipe_in(tmp_path), "simulated")
    folder = tmp_path / "moved"
    run("simulated", 2, until, recipe_in(folder), 1, 3)
    changes = {"parallel__data": 1, "parallel__tensor": 2, "parallel__pipeline": 2}
    run("simulated", 4, until, recipe_in(folder, checkpoint__resume=True, **changes), -1, 0)
    assert_stood(folder, straight, 0, exact=False)
    for found, expected in zip(metrics(folder), metrics(straight), strict=True):
        assert found.keys() == expected.keys()
        for key in expected.keys() - TIMINGS - {"validation_bits_per_byte"}:
            assert found[key] == pytest.approx(expected[key], rel=1e-9)


def test_stages_that_begin_inside_layers_resume_to_the_bit_and_as_any_others(tmp_path: Path, undisturbed: Undisturbed) -> None:
    def cut(folder: Path, *counts: float, **changes: object) -> Recipe:
        stages = {"model__layers": 4, "parallel__data": 1, "parallel__pipeline": 2, "parallel__balance": list(counts)}
        return recipe_in(folder, train__micro_batch=1, **{**stages, **changes})

    straight = undisturbed(cut(tmp_path, 1.5, 2.5), "simulated")
    for name, counts in (("same", (1.5, 2.5)), ("other", (2.5, 1.5)), ("whole", (2, 2))):
        folder = tmp_path / name
        assert run("simulated", 2, until, cut(folder, 1.5, 2.5), 1, 3)[0]["layers_of_stages"] == [1.5, 2.5]
        summary = run("simulated", 2, until, cut(folder, *counts, checkpoint__resume=True), -1, 0)[0]
        assert summary["layers_of_stages"] == list(counts)
        assert_stood(folder, straight, 0, exact=name == "same")


def test_resuming_where_nothing_is_begins_at_the_beginning(tmp_path: Path) -> None:
    summary = run("simulated", 2, until, recipe_in(tmp_path, checkpoint__resume=True), -1, 0)[0]
    assert (summary["ended"], summary["step"]) == ("done", STEPS)
    assert len(metrics(tmp_path)) == STEPS


def contents(folder: Path) -> dict[Path, bytes]:
    """All that the run has written, but for who was there when."""
    apart = (EPOCH, "ledger.jsonl")
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in apart}


def test_resuming_a_run_that_is_done_changes_nothing(tmp_path: Path) -> None:
    summary = run("simulated", 2, until, recipe_in(tmp_path), -1, 0)[0]
    before = contents(tmp_path)
    assert run("simulated", 2, until, recipe_in(tmp_path, checkpoint__resume=True), -1, 0) == [summary, summary]
    assert contents(tmp_path) == before


def test_a_stopped_run_that_is_asked_for_no_more_steps_is_done(tmp_path: Path) -> None:
    summary = run("simulated", 2, until, recipe_in(tmp_path), 0, 4)[0]
    assert summary["ended"] == "stopped"
    recipe = recipe_in(tmp_path, checkpoint__resume=True, train__steps=4)
    assert run("simulated", 2, until, recipe, -1, 0)[1] == {**summary, "ended": "done", "steps": 4}
    assert json.loads((tmp_path / "summary.json").read_text())["ended"] == "done"
    assert len(metrics(tmp_path)) == 4


def test_a_run_killed_after_its_last_checkpoint_is_done_when_resumed(tmp_path: Path) -> None:
    run("simulated", 2, until, recipe_in(tmp_path), 0, 3)
    stopped = (tmp_path / "summary.json").read_bytes()
    run("simulated", 2, until, recipe_in(tmp_path, checkpoint__resume=True), -1, 0)
    (tmp_path / "summary.json").write_bytes(stopped)
    summary = run("simulated", 2, until, recipe_in(tmp_path, checkpoint__resume=True), -1, 0)[0]
    assert (summary["ended"], summary["step"]) == ("done", STEPS)
    assert len(metrics(tmp_path)) == STEPS


def test_a_run_that_is_done_goes_on_when_given_more_steps(tmp_path: Path) -> None:
    run("simulated", 2, until, recipe_in(tmp_path), -1, 0)
    recipe = recipe_in(tmp_path, checkpoint__resume=True, train__steps=STEPS + 2)
    assert run("simulated", 2, until, recipe, -1, 0)[0]["step"] == STEPS + 2
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, STEPS + 3))


def poisoned(at: int, rank: int) -> Callable[..., StepResult]:
    """`train_step` with a NaN in one weight of one rank before step `at` (from 0)."""

    def step(state: TrainerState, number: int, *told: Callable[[], Any]) -> StepResult:
        if number == at and state.mesh.at("world") == rank:
            list(state.engine.model.parameters())[-1].data.view(-1)[3] = float("nan")
        return train_step(state, number, *told)

    return step


def diverging(communicator: Communicator, recipe: Recipe) -> str:
    with pytest.raises(GuardError) as error:
        go_on(communicator, recipe)
    return str(error.value)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_nan_ends_the_run_on_all_ranks_and_the_checkpoint_is_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Undisturbed, rank: int
) -> None:
    folder = tmp_path / "run"
    recipe = recipe_in(folder, parallel__pipeline=2, guard__on_nonfinite="stop", guard__check_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", poisoned(4, rank))
        messages = run("simulated", 4, diverging, recipe)
    assert len(set(messages)) == 1
    assert "step 5: loss or gradient not finite: loss nan" in messages[0]
    assert "checkpoint.resume=true" in messages[0]
    assert steps_saved(folder) == [2, 4]
    newest = latest(folder / "checkpoints")
    assert newest is not None
    assert verify(newest) == []
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    recipe.checkpoint.resume = True
    run("simulated", 4, until, recipe, -1, 0)
    assert_stood(folder, undisturbed(recipe_in(folder, parallel__pipeline=2), "simulated"), 2)


def with_own_seed(communicator: Communicator, recipe: Recipe) -> None:
    mine = replace(recipe, run=replace(recipe.run, seed=communicator.rank))
    whole_run.train(mine, communicator)


def test_a_rank_with_another_recipe_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^rank 1 has run\.seed=1 and rank 0 has run\.seed=0; give every rank the same"):
        run("simulated", 2, with_own_seed, recipe_in(tmp_path))


def with_own_folder(communicator: Communicator, recipe: Recipe) -> None:
    mine = replace(recipe.run, dir=f"{recipe.run.dir}-{min(communicator.rank, 1)}", name=f"it {communicator.rank}")
    cache = str(recipe.data.cache or "") + str(communicator.rank)
    whole_run.train(replace(recipe, run=mine, data=replace(recipe.data, cache=cache)), communicator)


def test_a_rank_with_another_run_directory_is_refused_before_it_makes_one(tmp_path: Path) -> None:
    """Under torchrun, ${now:} gives each rank another name. The ranks compare names before anything else. data.cache may differ."""
    said = (
        f'rank 1 has run.name="it 1", run.dir={tmp_path}/run-1 and rank 0 has run.name="it 0", run.dir={tmp_path}/run-0; '
        "give every rank the same run.name, with the time or the name written out where ${now:...} or ${oc.env:...} makes it"
    )
    with pytest.raises(RecipeError, match=f"^{re.escape(said)}"):
        run("simulated", 4, with_own_folder, recipe_in(tmp_path / "run", model__layers=4))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_draws_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("simulated", 2, until, recipe_in(tmp_path), 0, 3)
    monkeypatch.setattr(initialise, "normal_values", None)
    summary = run("simulated", 2, until, recipe_in(tmp_path, checkpoint__resume=True), -1, 0)[0]
    assert (summary["ended"], summary["step"]) == ("done", STEPS)


def test_checkpoints_that_go_away_while_a_run_starts_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights were not drawn, so it must not begin with those."""
    run("simulated", 2, until, recipe_in(tmp_path), 0, 3)

    def lose(state: TrainerState, scratch: Path | None) -> Fence:
        fence = take_checkpoints(state, scratch)
        if state.mesh.at("world") == 0:
            for path in list_checkpoints(tmp_path / "checkpoints"):
                shutil.rmtree(path)
        return fence

    monkeypatch.setattr(whole_run, "take_checkpoints", lose)
    with pytest.raises(CheckpointStorageError, match="are gone; see whether its storage is mounted"):
        run("simulated", 2, until, recipe_in(tmp_path, checkpoint__resume=True), -1, 0)
