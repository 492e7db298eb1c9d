"""Layers that move while a run goes on: the curve is that of one process, a failure half-way leaves the old split."""

import gc
import json
import threading
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagualu.comm.group import Communicator
from bagualu.parallel import move_state
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.balance.stages.rebalance_policy import Proposal
from bagualu.parallel.pipeline.layer_slice import LayerSlice, parts_of
from bagualu.parallel.pipeline.recorded_timeline import read_measured
from bagualu.parallel.pipeline.stopwatch import Stopwatch
from bagualu.trainer import rebalance
from bagualu.trainer import run as whole_run
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.decoder import initialise
from bagualu.trainer.models.decoder.model import Layer
from bagualu.trainer.rebalance import move
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.conftest import Undisturbed
from tests.harness import BACKENDS, run
from tests.parity import Curve, assert_same, gather, pieces_of, small_recipe, train
from tests.standing import assert_stood, train_noting_samples
from tests.trainer.states import load_state, save_state

MOE = {
    "model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2, "model__moe__bias_rate": 0.05,
    "model__tie_embeddings": True, "model__layers": 7,
}  # fmt: skip


def recipe_for(**layout: object) -> Recipe:
    """The guard looks at every step: state that a move leaves under a wrong seal is damage to it."""
    return small_recipe(
        **MOE,
        guard__check_every=1,
        train__micro_batch=1 if layout.get("pipeline") == 4 else 2,
        **{f"parallel__{axis}": degree for axis, degree in layout.items()},
    )


def split_of(*counts: float) -> Split:
    borders = [int(2 * sum(counts[:stage])) for stage in range(len(counts) + 1)]
    return Split([LayerSlice(*pair) for pair in pairwise(borders)], ["none"] * int(sum(counts)))


def train_moving(communicator: Communicator, recipe: Recipe, splits: list[Split]) -> Curve:
    """One step on each of `splits`, the first one that of the recipe."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    initial, results = pieces_of(state), []
    for step, split in enumerate(splits):
        if step:
            move(state, split, step)
            assert list(state.engine.model.layers) == [str(i) for i in parts_of(split.slices[s] for s in state.mesh.stages)]
        results.append(train_step(state, step))
    assert all(result.committed for result in results)
    figures = [[r.loss for r in results], [r.balance_loss for r in results], [r.grad_norm for r in results]]
    return Curve(*figures, pieces_of(state), initial)


Case = tuple[dict[str, object], list[tuple[int, ...]]]
SLOW_CASES: list[Case] = [
    ({"pipeline": 2}, [(3, 4), (6, 1), (1, 6)]),
    ({"pipeline": 4, "data": 2, "schedule": "zb_h1"}, [(2, 2, 2, 1), (1, 1, 4, 1), (3, 1, 1, 2)]),
    ({"pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2}, [(2, 2, 2, 1), (4, 1, 1, 1), (1, 1, 1, 4)]),
]
CASES: list[Any] = [
    ({"pipeline": 2, "data": 2, "zero": 0}, [(3, 4), (5, 2), (4, 3)]),
    ({"pipeline": 2, "data": 2, "expert": 2, "tensor": 2, "sequence": True}, [(3, 4), (5, 2), (2, 5)]),
    ({"pipeline": 2, "data": 2, "schedule": "zb_v"}, [(2, 2, 2, 1), (1, 3, 1, 2), (1, 1, 1, 4)]),
    ({"pipeline": 2, "data": 2, "expert": 2, "zero": 3}, [(3.5, 3.5), (5, 2), (2.5, 4.5)]),
    ({"pipeline": 2, "data": 2, "schedule": "zb_v"}, [(2, 1.5, 2, 1.5), (1, 3, 1.5, 1.5), (2, 2, 2, 1)]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES),
]


@pytest.fixture(scope="module")
def alone() -> list[Curve]:
    return run("simulated", 1, train, recipe_for(), 3)


@pytest.mark.parametrize(("layout", "splits"), CASES, ids=lambda case: "-".join(map(str, case)).replace(" ", ""))
def test_the_curve_is_that_of_one_process(alone: list[Curve], layout: dict[str, object], splits: list[tuple[int, ...]]) -> None:
    recipe = recipe_for(**layout, balance=list(splits[0]))
    moving = [split_of(*counts) for counts in splits]
    assert_same(run("simulated", recipe.world_size(), train_moving, recipe, moving), alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_muon_brings_together_the_matrices_of_moved_layers(backend: str) -> None:
    recipe = recipe_for(pipeline=2, data=2, expert=2, balance=[3, 4])
    recipe.optim.name = "muon"
    alone = replace(recipe, parallel=recipe_for().parallel)
    moving = [split_of(3, 4), split_of(5.5, 1.5), split_of(1, 6)]
    assert_same(run(backend, 4, train_moving, recipe, moving), run("simulated", 1, train, alone, 3))


def test_over_processes(alone: list[Curve]) -> None:
    recipe = recipe_for(pipeline=2, data=2, balance=[3, 4])
    assert_same(run("gloo", 4, train_moving, recipe, [split_of(3, 4), split_of(5, 2), split_of(1, 6)]), alone)


def bits(state: TrainerState) -> dict[str, bytes]:
    return {f"{name}@{offset}": values.tobytes() for name, _, offset, values in pieces_of(state)}


def test_state_and_weights_are_the_same_bits_after_moving_there_and_back() -> None:
    def there_and_back(communicator: Communicator, recipe: Recipe) -> None:
        state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
        train_step(state, 0)
        weights = {name: parameter.detach().clone() for name, parameter in state.engine.model.named_parameters()}
        before, home = bits(state), state.split
        move(state, split_of(4.5, 2.5), 1)
        move(state, home, 1)
        assert bits(state) == before
        for name, parameter in state.engine.model.named_parameters():
            assert (parameter == weights[name]).all(), name

    recipe = recipe_for(pipeline=2, data=2, balance=[3, 4])
    recipe.train.dtype = "bfloat16"
    run("simulated", 4, there_and_back, recipe)


def failing(communicator: Communicator, recipe: Recipe, where: str) -> Curve:
    """Does what `train` does, but layers are to move before step 2, and rank 1 fails to move them."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    initial, results = pieces_of(state), [train_step(state, 0)]
    stages, model, before = state.engine, state.runner.model, bits(state)
    if communicator.rank == 1:
        state.mesh.monitor.observers.append(_Failing(where))
    with pytest.raises(rebalance.MoveError, match="rank 1: MemoryError: no room"):
        move(state, split_of(5, 2), 1)
    state.mesh.monitor.observers.clear()
    assert state.engine is stages
    assert state.runner.model is model
    assert bits(state) == before
    results += [train_step(state, step) for step in (1, 2)]
    figures = [[r.loss for r in results], [r.balance_loss for r in results], [r.grad_norm for r in results]]
    return Curve(*figures, pieces_of(state), initial)


class _Failing:
    """Fails this rank in the middle of a move: where it makes room, or where it has received what is on its way."""

    def __init__(self, where: str) -> None:
        self.where = where

    def at(self, point: str, step: int) -> None:
        if point == self.where:
            raise MemoryError("no room")

    def waits(self, what: str | None) -> None:
        return None


@pytest.mark.parametrize("where", ["move", "moved"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_fails_half_way_leaves_everything_as_it_was(alone: list[Curve], backend: str, where: str) -> None:
    recipe = recipe_for(pipeline=2, data=2, balance=[3, 4])
    assert_same(run(backend, 4, failing, recipe, where), alone)


def test_a_rank_without_room_for_what_is_to_come_leaves_everything_as_it_was(
    alone: list[Curve], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first message: nobody waits for the others."""

    def room(*given: Any) -> Any:
        if threading.current_thread().name == "rank-1":
            raise MemoryError("no room")
        return make_room(*given)

    make_room = move_state._buffer
    monkeypatch.setattr(move_state, "_buffer", room)
    assert_same(run("simulated", 4, failing, recipe_for(pipeline=2, data=2, balance=[3, 4]), "never"), alone)


def leaking(communicator: Communicator, recipe: Recipe) -> int:
    """How many of the tensors that lay in buckets before moves are still there after them."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    before = []
    for step, counts in enumerate(((5, 2), (2, 5), (3, 4))):
        before += [weakref.ref(one) for bucket in state.engine.buckets for one in (bucket.weights, bucket.gradients)]
        train_step(state, step)
        move(state, split_of(*counts), step + 1)
    if communicator.rank == 1:
        state.mesh.monitor.observers.append(_Failing("moved"))
    with pytest.raises(rebalance.MoveError):
        move(state, split_of(5, 2), 3)
    state.mesh.monitor.observers.clear()
    gc.collect()
    return sum(ref() is not None for ref in before)


def there_and_back(communicator: Communicator, recipe: Recipe) -> list[Any]:
    """The state before layers move away, and after they have come back."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    train_step(state, 0)
    before = pieces_of(state)
    move(state, split_of(5, 2), 1)
    move(state, split_of(3, 4), 1)
    return [before, pieces_of(state)]


def test_what_moves_keeps_its_dtype_and_every_bit() -> None:
    """Master weights in float32, moments in bfloat16, biases, and frozen weights that are bfloat16 themselves."""
    recipe = recipe_for(pipeline=2, data=2, zero=2, balance=[3, 4])
    recipe.train.dtype, recipe.optim.moments_dtype = "bfloat16", "bfloat16"
    recipe.optim.groups = [{"pattern": "layers.3.*", "frozen": True}]
    for before, after in run("simulated", 4, there_and_back, recipe):
        for (name, *_, one), (_, *_, two) in zip(before, after, strict=True):
            assert one.tobytes() == two.tobytes(), name


def test_nothing_is_kept_of_what_was_there_before() -> None:
    assert run("gloo", 2, leaking, recipe_for(pipeline=2, balance=[3, 4])) == [0, 0]


def priced(communicator: Communicator, recipe: Recipe, counts: tuple[float, float]) -> tuple[float, float]:
    """What rank 0, which gets nothing of it, takes a move between the other ranks to have moved, in bytes; and its price again."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    rebalancer = rebalance.Rebalancer(state, None, 1)
    there, back = split_of(3, *counts), split_of(3, 2, 2)
    moved = rebalancer._move(Proposal(there, [1.0] * 3, 2.0, 1.0), 1)
    return rebalancer._bytes_per_second * moved.seconds, rebalancer._move_seconds(back) / moved.seconds


@pytest.mark.parametrize(("counts", "part"), [((3, 1), ".5."), ((2.5, 1.5), ".5.attention")])
def test_a_move_is_priced_by_what_has_moved_wherever_that_was(counts: tuple[float, float], part: str) -> None:
    recipe = recipe_for(pipeline=3, balance=[3, 2, 2])
    elements = sum(values.size for name, _, _, values in run("simulated", 1, train, recipe_for(), 1)[0].pieces if part in name)
    for moved_bytes, again in run("simulated", 3, priced, recipe, counts):
        assert moved_bytes == pytest.approx(8 * elements)
        assert again == pytest.approx(1.0)


def test_weights_that_are_to_come_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def move_without_drawing(communicator: Communicator, recipe: Recipe) -> None:
        state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
        state.mesh.group("world").barrier()
        monkeypatch.setattr(initialise, "normal_values", None)
        move(state, split_of(5, 2), 0)

    run("simulated", 2, move_without_drawing, recipe_for(pipeline=2, balance=[3, 4]))


@pytest.mark.parametrize("balance", ["uniform", "analytic"])
def test_steps_that_are_left_out_measure_nothing(tmp_path: Path, balance: str) -> None:
    recipe = slow_recipe(
        tmp_path, parallel__balance=balance, parallel__rebalance__every=1, guard__leave_out=[1, 2, 3], train__steps=6
    )
    assert run("simulated", 2, train_all, recipe)[0]["ended"] == "done"
    assert read_measured(tmp_path / "pipeline.jsonl").step == 4


def test_moves_go_together_with_saves_replicas_and_a_guard_that_looks_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers move at every second step, there and back; a save in the background and a replica are under way."""

    def every_second(rebalancer: rebalance.Rebalancer, step: int) -> Any:
        counts = (5, 3) if step % 4 == 2 else (4, 4)
        return rebalancer._move(Proposal(split_of(*counts), [1.0, 1.0], 2.0, 1.0), step) if step % 2 == 0 else None

    straight = slow_recipe(tmp_path / "straight", parallel__rebalance__every=0, train__steps=9)
    run("simulated", 2, train_all, straight)
    monkeypatch.setattr(rebalance.Rebalancer, "after_step", every_second)
    moving = slow_recipe(
        tmp_path / "moving", train__steps=9, guard__check_every=1, checkpoint__every=2, checkpoint__asynchronous=True,
        checkpoint__replica_every=1,
    )  # fmt: skip
    (tmp_path / "scratch").mkdir()
    summary = run("simulated", 2, train_all, moving, tmp_path / "scratch")[0]
    assert (summary["ended"], summary["guard"]["rolled_back"], summary["checkpoints_failed"]) == ("done", 0, 0)
    np.testing.assert_allclose(losses(tmp_path / "moving"), losses(tmp_path / "straight"), rtol=1e-9)


@pytest.mark.parametrize("where", ["move", "moved"])
def test_a_run_in_which_layers_could_not_move_is_the_one_in_which_they_stayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Undisturbed, where: str
) -> None:
    """Tried after every second step, while saves and replicas are under way."""
    recipe = slow_recipe(
        tmp_path / "run", train__steps=9, checkpoint__every=2, checkpoint__asynchronous=True, checkpoint__replica_every=1
    )
    reference = undisturbed(slow_recipe(tmp_path, train__steps=9, parallel__rebalance__every=0), "simulated")

    def every_second(rebalancer: rebalance.Rebalancer, step: int) -> Any:
        return rebalancer._move(Proposal(split_of(5, 3), [1.0, 1.0], 2.0, 1.0), step) if step % 2 == 0 else None

    def failing_in_vain(communicator: Communicator) -> dict[str, Any]:
        if communicator.rank == 1:
            communicator.monitor.observers.append(_Failing(where))
        return train_noting_samples(recipe, communicator, lambda: False, tmp_path / "scratch")

    monkeypatch.setattr(rebalance.Rebalancer, "after_step", every_second)
    (tmp_path / "scratch").mkdir()
    assert run("simulated", 2, failing_in_vain)[0]["layers_of_stages"] == [4, 4]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "layers_of_stages" in line] == [2, 4, 6, 8]
    assert_stood(tmp_path / "run", reference, 0)


def slow_recipe(folder: Path, **changes: object) -> Recipe:
    defaults: dict[str, object] = {
        "run__dir": str(folder), "train__steps": 16, "train__validation_sequences": 0, "log__progress": "off",
        "checkpoint__every": 0, "parallel__pipeline": 2, "parallel__balance": "analytic", "parallel__rebalance__every": 2,
        "parallel__rebalance__windows": 2, "model__layers": 8, "train__micro_batch": 2,
    }  # fmt: skip
    return small_recipe(**{**defaults, **changes})


def train_all(communicator: Communicator, recipe: Recipe, scratch: Path | None = None) -> dict[str, Any]:
    return whole_run.train(recipe, communicator, scratch=scratch)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("schedule", "even"), [("1f1b", [4, 4]), ("zb_v", [2, 2, 2, 2])])
def test_a_run_moves_layers_away_from_a_rank_that_has_become_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], schedule: str, even: list[int]
) -> None:
    """Layers take 1 ms a micro-batch, on rank 1 from step 5 on 3 ms: by a clock that only they turn, so another load on this
    machine is no slowness of a rank."""
    clocks = {"rank-0": 0.0, "rank-1": 0.0}
    seen = []

    def slowed(layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        rank = threading.current_thread().name
        if rank == "rank-1":
            seen.append(None)
        clocks[rank] += 0.003 if rank == "rank-1" and len(seen) > 4 * 4 * 4 else 0.001  # steps, micro-batches, layers
        return forward(layer, x)

    forward = Layer.forward
    monkeypatch.setattr(Stopwatch, "_now", lambda _: clocks[threading.current_thread().name])
    summaries = {}
    for name, every in (("still", 0), ("moving", 2)):
        recipe = slow_recipe(tmp_path / name, parallel__rebalance__every=every, parallel__schedule=schedule)
        monkeypatch.setattr(Layer, "forward", slowed if every else forward)
        summaries[name] = run("simulated", 2, train_all, recipe)[0]
    counts = summaries["moving"]["layers_of_stages"]
    assert summaries["still"]["layers_of_stages"] == even
    assert sum(counts) == 8
    assert sum(counts[:1] + counts[3:]) > 4  # those of rank 0: the first stage, and in the V the last one too
    np.testing.assert_allclose(losses(tmp_path / "moving"), losses(tmp_path / "still"), rtol=1e-9)
    assert f"layers move from {even} to " in capfd.readouterr().err
    moved = [json.loads(line) for line in (tmp_path / "moving" / "metrics.jsonl").read_text().splitlines()]
    assert counts in [line.get("layers_of_stages") for line in moved]
    assert all(line["move_seconds"] > 0 for line in moved if "layers_of_stages" in line)
    ledger = summaries["moving"]["ledger"]
    assert ledger["balance"] > 0


def test_what_was_saved_after_a_move_is_taken_by_any_other_split(tmp_path: Path) -> None:
    recipe = recipe_for(pipeline=2, data=2, balance=[3, 4])
    recipe.run.dir = str(tmp_path)

    def save(communicator: Communicator) -> dict[str, bytes]:
        state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
        train_step(state, 0)
        move(state, split_of(5.5, 1.5), 1)
        save_state(state, 1)
        return bits(state)

    def load(communicator: Communicator, other: Recipe) -> dict[str, np.ndarray]:
        state = assemble(other, communicator, prepare(other.data, other.model.vocab))
        load_state(state, tmp_path / "checkpoints" / "step-00000001")
        return pieces_of(state)

    run("simulated", 4, save)
    whole = None
    v = {"pipeline": 2, "schedule": "zb_v", "balance": [0.5, 4, 1, 1.5]}
    for layout in ({"pipeline": 1}, v, {"pipeline": 3, "data": 2}, {"pipeline": 2, "balance": [2.5, 4.5], "zero": 3}):
        other = recipe_for(**layout)
        other.run.dir = str(tmp_path)
        found = gather(run("simulated", other.world_size(), load, other))
        whole = whole or found
        assert found.keys() == whole.keys()
        assert all(np.array_equal(found[name], values) for name, values in whole.items())
