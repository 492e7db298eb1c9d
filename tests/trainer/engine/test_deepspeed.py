"""parallel.engine=deepspeed trains the curve of one process, and none of the ways in which DeepSpeed differs shows."""

import gc
import json
import logging
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagualu.comm.group import Communicator
from bagualu.comm.objects import gather_json
from bagualu.fault_tolerance.guard.damage import DamageCheck, as_json, from_json
from bagualu.parallel.config import DeepSpeedConfig
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.engine.deepspeed import DeepSpeedEngine
from bagualu.trainer.engine.deepspeed_library import load
from bagualu.trainer.rebalance import move
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import StepResult, train_step
from tests.harness import run
from tests.parity import gather, pieces_of, small_recipe
from tests.trainer.states import load_state, save_state
from tests.trainer.test_rebalance import split_of

STEPS = 5
RELATIVE = 2e-5
"""How far float32 may be from one process after `STEPS` steps: losses, norms; weights by the norm of a tensor's difference."""
MOE = {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2, "model__moe__shared_experts": 1}
TIED = {"model__tie_embeddings": True, "model__vocab": 61}
BIASED = {**MOE, "model__moe__bias_rate": 0.05}
FROZEN = {"optim__groups": [{"pattern": name, "frozen": True} for name in ("embedding.weight", "layers.0.*", "layers.2.*norm.*")]}
Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]
SLOW = pytest.mark.slow
"""For those of many cases that differ from others in one way only."""


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., DeepSpeedConfig]:
    """Makes parallel.deepspeed with a file in which DeepSpeed divides all parameters, also small ones, as it does large models."""

    def made(**keys: Any) -> DeepSpeedConfig:
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
        return DeepSpeedConfig(config=str(path), **keys)

    return made


def recipe_for(zero: int, **changes: object) -> Recipe:
    return small_recipe(
        **{
            "train__dtype": "float32", "train__steps": STEPS, "train__micro_batch": 2, "parallel__engine": "deepspeed",
            "parallel__zero": zero, **changes,
        }
    )  # fmt: skip


def native(**changes: object) -> Recipe:
    return recipe_for(1, **changes, parallel__engine="native")


def fresh(communicator: Communicator, recipe: Recipe) -> TrainerState:
    return assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))


class Trained:
    """What must not depend on the engine, on one rank."""

    def __init__(self, results: list[StepResult], initial: Pieces, pieces: Pieces, parameters: int) -> None:
        self.losses, self.norms = [r.loss for r in results], [r.grad_norm for r in results]
        self.attempts, self.committed = [r.verdict.attempts for r in results], [r.committed for r in results]
        self.initial, self.pieces, self.parameters = initial, pieces, parameters


Change = Callable[[TrainerState, int], None]
"""Called before step `step` (from 0)."""


def train(communicator: Communicator, recipe: Recipe, change: Change | None = None) -> Trained:
    state = fresh(communicator, recipe)
    initial, results = pieces_of(state), []
    for step in range(STEPS):
        if change is not None:
            change(state, step)
        results.append(train_step(state, step))
    trained = Trained(results, initial, pieces_of(state), state.engine.parameters)
    state.engine.close()
    return trained


def alone(change: Change | None = None, **changes: object) -> list[Trained]:
    return run("simulated", 1, train, native(**changes), change)


def assert_same_curve(actual: list[Trained], expected: list[Trained]) -> None:
    np.testing.assert_allclose(actual[0].losses, expected[0].losses, rtol=RELATIVE)
    np.testing.assert_allclose(actual[0].norms, expected[0].norms, rtol=RELATIVE)
    assert_equal(gather([one.initial for one in actual]), gather([one.initial for one in expected]))
    after, reference = gather([one.pieces for one in actual]), gather([one.pieces for one in expected])
    assert after.keys() == reference.keys()
    for name, values in reference.items():
        if name.startswith("weight/"):
            difference = np.linalg.norm(after[name] - values) / np.linalg.norm(values)
            assert difference <= RELATIVE, f"{name}: {difference}"
    assert sum(one.parameters for one in actual) == sum(one.parameters for one in expected)


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.tobytes() == other[name].tobytes(), name


# stage, ranks, what differs from data parallel ranks alone
CURVES: list[tuple[int, int, dict[str, Any]]] = [
    (1, 2, {}),
    (2, 4, {"parallel__tensor": 2, "parallel__sequence": True, "optim__name": "sgd"}),
    (3, 4, {"parallel__tensor": 2, **FROZEN, **BIASED}),
    (2, 2, {"parallel__expert": 2, **BIASED, **FROZEN, "optim__name": "lion"}),
]
MORE_CURVES: list[tuple[int, int, dict[str, Any]]] = [
    (1, 1, {}),
    (1, 4, TIED),
    (1, 4, {"parallel__tensor": 2, "parallel__sequence": True, **FROZEN}),
    (1, 4, {"parallel__expert": 2, "parallel__tensor": 2, **BIASED}),
    (1, 2, {"parallel__shares": [3, 1]}),
    (1, 2, {"parallel__pipeline": 2}),
    (1, 4, {"parallel__pipeline": 2, "parallel__balance": [2.5, 1.5], **TIED}),
    (1, 4, {"parallel__pipeline": 2, **TIED, "parallel__schedule": "interleaved_1f1b"}),
    (1, 4, {"parallel__pipeline": 2, "parallel__tensor": 2, **TIED}),
    (1, 8, {"parallel__pipeline": 2, "parallel__tensor": 2, "parallel__expert": 2, **BIASED, "parallel__schedule": "gpipe"}),
    (2, 8, {"parallel__tensor": 2, "parallel__expert": 4, **MOE}),
    (3, 8, {**TIED, "train__micro_batch": 1}),
    (2, 1, TIED),
    (2, 3, {"data__global_batch": 12}),
    (2, 4, {"parallel__expert": 2, **MOE, "train__recompute": "full"}),
    (2, 2, {"optim__name": "lion", **TIED}),
    (2, 4, {"parallel__tensor": 2, **FROZEN}),
    (3, 1, FROZEN),
    (3, 2, {**TIED, "train__recompute": "full"}),
    (3, 2, {**MOE, "train__recompute": "experts", "train__offload_bytes": 2**20}),
    (3, 3, {"data__global_batch": 12}),
    (3, 4, {"parallel__tensor": 2, "parallel__sequence": True, **BIASED}),
    (3, 2, {"optim__name": "sgd", **MOE}),
]


def curve_name(case: tuple[int, int, dict[str, Any]]) -> str:
    return f"zero{case[0]}-{case[1]}ranks-" + "-".join(f"{key.rpartition('__')[2]}" for key in case[2])


@pytest.mark.parametrize("case", [*CURVES, *(pytest.param(one, marks=SLOW) for one in MORE_CURVES)], ids=curve_name)
def test_trains_the_curve_of_one_process(case: tuple[int, int, dict[str, Any]], settings: Callable[..., DeepSpeedConfig]) -> None:
    zero, world, changes = case
    model = {key: value for key, value in changes.items() if not key.startswith(("parallel__", "train__"))}
    recipe = recipe_for(zero, parallel__deepspeed=settings(), **changes)
    assert_same_curve(run("gloo", world, train, recipe), alone(**model))


def skip_a_layer(state: TrainerState, step: int) -> None:
    """Leaves layer 1 out in the steps 2 and 3 of 5."""
    layer: Any = state.engine.model.layers["1"]
    if step in (1, 2):
        layer.forward = lambda x: (x, None, None)
    elif "forward" in vars(layer):
        del layer.forward


def skip_a_layer_on_one_rank(state: TrainerState, step: int) -> None:
    if state.mesh.at("world") == 1:
        skip_a_layer(state, step)


def starve_experts(state: TrainerState, step: int) -> None:
    """Has the last two experts of layer 1 get tokens in the steps 1 and 4 alone."""
    bias = state.engine.model.get_buffer("layers.1.feed_forward.router.bias")
    bias[2:] = 0.0 if step in (0, 3) else -100.0


@pytest.mark.parametrize(
    ("change", "zero", "offload", "changes"),
    [
        (skip_a_layer, 3, "none", {}),
        (skip_a_layer, 2, "optimizer", {}),
        (starve_experts, 2, "none", {**BIASED, "parallel__expert": 2}),
        pytest.param(skip_a_layer, 1, "none", {}, marks=SLOW),
        pytest.param(skip_a_layer, 2, "none", {}, marks=SLOW),
        pytest.param(skip_a_layer, 1, "optimizer", {}, marks=SLOW),
        pytest.param(skip_a_layer, 3, "parameters", {}, marks=SLOW),
        pytest.param(starve_experts, 1, "none", {**BIASED, "parallel__expert": 2}, marks=SLOW),
        pytest.param(starve_experts, 3, "none", BIASED, marks=SLOW),
    ],
)
def test_parameters_without_a_gradient_get_zeros(
    change: Change, zero: int, offload: str, changes: dict[str, Any], settings: Callable[..., DeepSpeedConfig]
) -> None:
    """DeepSpeed applies the gradient of an earlier step again, in ZeRO-3 and wherever it offloads the optimizer."""
    recipe = recipe_for(zero, **changes, parallel__deepspeed=settings(offload=offload))
    model = {key: value for key, value in changes.items() if not key.startswith("parallel__")}
    assert_same_curve(run("gloo", 2, train, recipe, change), alone(change, **model))


def test_ranks_may_differ_in_the_parameters_without_a_gradient_in_zero_1() -> None:
    """Otherwise DeepSpeed would add gradients of different parameters to one another."""
    ours, theirs = (run("gloo", 2, train, one, skip_a_layer_on_one_rank) for one in (native(), recipe_for(1)))
    assert_same_curve(theirs, ours)


def poison_once(state: TrainerState, step: int) -> None:
    """Has a gradient of rank 0 not be finite in the first attempt at step 3, as a fault of the hardware would."""
    if step != 2 or state.mesh.at("world"):
        return
    seen, armed = state.engine.before_reduction, [True]

    def poison(gradient: torch.Tensor) -> None:
        assert seen is not None
        if armed:
            armed.clear()
            gradient.view(-1)[0] = torch.nan
        seen(gradient)

    state.engine.before_reduction = poison


def with_and_without(communicator: Communicator, recipe: Recipe) -> tuple[Trained, Trained]:
    return train(communicator, recipe), train(communicator, recipe, poison_once)


@pytest.mark.parametrize(
    ("zero", "dtype", "offload"),
    [
        (1, "bfloat16", "optimizer"),
        (2, "bfloat16", "none"),
        (3, "float32", "optimizer"),
        pytest.param(1, "float32", "none", marks=SLOW),
        pytest.param(1, "bfloat16", "none", marks=SLOW),
        pytest.param(1, "float32", "optimizer", marks=SLOW),
        pytest.param(2, "float32", "none", marks=SLOW),
        pytest.param(2, "float32", "optimizer", marks=SLOW),
        pytest.param(2, "bfloat16", "optimizer", marks=SLOW),
        pytest.param(3, "bfloat16", "none", marks=SLOW),
        pytest.param(3, "bfloat16", "parameters", marks=SLOW),
    ],
)
def test_a_discarded_attempt_leaves_no_trace(zero: int, dtype: str, offload: str, settings: Callable[..., DeepSpeedConfig]) -> None:
    recipe = recipe_for(zero, train__dtype=dtype, parallel__deepspeed=settings(offload=offload), train__micro_batch=1)
    for undisturbed, disturbed in run("gloo", 2, with_and_without, recipe):
        assert disturbed.attempts == [1, 1, 2, 1, 1]
        assert all(disturbed.committed)
        assert repr(disturbed.losses + disturbed.norms) == repr(undisturbed.losses + undisturbed.norms)
        for one, other in zip(undisturbed.pieces, disturbed.pieces, strict=True):
            assert one[:3] == other[:3]
            assert one[3].tobytes() == other[3].tobytes(), one[0]


def first_gradient(communicator: Communicator, recipe: Recipe) -> tuple[Pieces, Pieces, float]:
    """Returns the weights and moments before the first step and after it, and the gradient norm of that step."""
    state = fresh(communicator, recipe)
    initial = pieces_of(state)
    norm = train_step(state, 0).grad_norm
    answer = initial, pieces_of(state), norm
    state.engine.close()
    return answer


@pytest.mark.parametrize(
    ("zero", "offload", "expert"),
    [(1, "none", 2), (3, "none", 1), *(pytest.param(*one, 1, marks=SLOW) for one in ((2, "none"), (1, "optimizer")))],
)
def test_bfloat16_adds_gradients_in_float32(zero: int, offload: str, expert: int, settings: Callable[..., DeepSpeedConfig]) -> None:
    """DeepSpeed adds and reduces in bfloat16 unless it is told otherwise in two places, and rounds every micro-batch's gradient to
    it: each changes the first moments by a part of 2**-9. Master weights begin as rounded weights, as those of every engine."""
    changes = {"train__dtype": "bfloat16", "train__micro_batch": 1, "parallel__expert": expert, **BIASED}
    recipe = recipe_for(zero, parallel__deepspeed=settings(offload=offload), **changes)
    ours, theirs = (run("gloo", 2, first_gradient, one) for one in (native(**changes), recipe))
    assert_equal(gather([one[0] for one in theirs]), gather([one[0] for one in ours]))
    np.testing.assert_allclose(theirs[0][2], ours[0][2], rtol=1e-6)
    after, reference = gather([one[1] for one in theirs]), gather([one[1] for one in ours])
    for name in (one for one in reference if one.startswith("exp_avg/")):
        assert np.linalg.norm(after[name] - reference[name]) <= 1e-6 * np.linalg.norm(reference[name]), name


# engine, stage, ranks, layout
Link = tuple[str, int, int, dict[str, Any]]
CHAINS: list[tuple[str, list[Link], dict[str, Any]]] = [
    ("float32", [("native", 1, 2, {}), ("deepspeed", 3, 4, {}), ("deepspeed", 1, 1, {})], {}),
    ("bfloat16", [("deepspeed", 2, 2, {}), ("native", 2, 4, {"parallel__tensor": 2}), ("deepspeed", 3, 1, {})],
     {**BIASED, **FROZEN}),
]  # fmt: skip
MORE_CHAINS: list[tuple[str, list[Link], dict[str, Any]]] = [
    ("bfloat16", [("native", 1, 2, {}), ("deepspeed", 1, 4, {"parallel__tensor": 2}), ("native", 0, 1, {})], TIED),
    ("float32", [("deepspeed", 3, 2, {}), ("deepspeed", 2, 4, {"parallel__expert": 2}), ("deepspeed", 3, 1, {})],
     {**BIASED, **FROZEN}),
    ("float32", [("deepspeed", 1, 4, {"parallel__pipeline": 2}), ("native", 2, 2, {}), ("deepspeed", 2, 3, {})],
     {**TIED, "data__global_batch": 12}),
    ("bfloat16", [("deepspeed", 3, 2, {}), ("deepspeed", 3, 4, {"parallel__tensor": 2}), ("native", 1, 1, {})],
     {"optim__moments_dtype": "bfloat16", "optim__name": "lion"}),
]  # fmt: skip


def go_on(communicator: Communicator, recipe: Recipe, start: int, before: str | None) -> tuple[str, Pieces, list[float], Pieces]:
    """Trains two steps from the checkpoint `before` and saves. Returns the new checkpoint, the state that was loaded, losses, and
    the state that was saved."""
    state = fresh(communicator, recipe)
    if before is not None:
        assert load_state(state, Path(before)) == start
    loaded = pieces_of(state)
    losses = [train_step(state, step).loss for step in (start, start + 1)]
    path = save_state(state, start + 2)
    saved = pieces_of(state)
    state.engine.close()
    return str(path), loaded, losses, saved


@pytest.mark.parametrize(
    ("dtype", "chain", "model"),
    [*CHAINS, *(pytest.param(*one, marks=SLOW) for one in MORE_CHAINS)],
    ids=["-".join([dtype, *(f"{engine}{zero}" for engine, zero, *_ in chain)]) for dtype, chain, _ in [*CHAINS, *MORE_CHAINS]],
)
def test_a_run_changes_engine_stage_and_ranks_at_a_checkpoint(
    tmp_path: Path, dtype: str, chain: list[Link], model: dict[str, Any], settings: Callable[..., DeepSpeedConfig]
) -> None:
    """Weights and moments are the same to the bit before the first step on the new engine."""
    model = {"train__dtype": dtype, "train__micro_batch": 1, "train__steps": 6, **model}
    losses: list[float] = []
    saved, path = None, None
    for number, (engine, zero, world, layout) in enumerate(chain):
        own = {"parallel__deepspeed": settings()} if engine == "deepspeed" else {}
        recipe = recipe_for(zero, **{**model, **own, **layout}, parallel__engine=engine, run__dir=str(tmp_path / str(number)))
        results = run("gloo", world, go_on, recipe, 2 * number, path)
        if saved is not None:
            assert_equal(gather([one[1] for one in results]), saved)
        path, losses, saved = results[0][0], losses + results[0][2], gather([one[3] for one in results])
        assert not [file for file in tmp_path.rglob("*") if file.suffix == ".pt" or file.name == "latest"]
    straight = native(**model, run__dir=str(tmp_path / "straight"))
    (expected,) = run("simulated", 1, train_six, straight)
    np.testing.assert_allclose(losses, expected, rtol=RELATIVE if dtype == "float32" else 2e-3)


def back_and_on(communicator: Communicator, recipe: Recipe) -> tuple[float, float, bool]:
    """Trains four steps, goes back to the second, and computes the third again; returns its losses, and whether it led to the same
    state."""
    state = fresh(communicator, recipe)
    for step in range(2):
        train_step(state, step)
    path = save_state(state, 2)
    first, there = train_step(state, 2).loss, pieces_of(state)
    train_step(state, 3)
    assert load_state(state, path) == 2
    again, back = train_step(state, 2).loss, pieces_of(state)
    state.engine.close()
    return first, again, all(one[3].tobytes() == other[3].tobytes() for one, other in zip(there, back, strict=True))


@pytest.mark.parametrize("zero", [3, *(pytest.param(zero, marks=SLOW) for zero in (1, 2))])
def test_a_run_goes_back_to_a_checkpoint(tmp_path: Path, zero: int) -> None:
    """With ZeRO-3's default, under which DeepSpeed keeps whole copies of small parameters beside its parts."""
    for first, again, same in run("gloo", 2, back_and_on, recipe_for(zero, run__dir=str(tmp_path), train__dtype="bfloat16")):
        assert first == again
        assert same


def train_six(communicator: Communicator, recipe: Recipe) -> list[float]:
    state = fresh(communicator, recipe)
    return [train_step(state, step).loss for step in range(6)]


def frozen_bits(communicator: Communicator, recipe: Recipe) -> tuple[Pieces, Pieces, int]:
    state = fresh(communicator, recipe)
    before = pieces_of(state)
    for step in range(3):
        train_step(state, step)
    left = sum(parameter.numel() for parameter in state.engine.model.parameters() if not parameter.requires_grad)
    after = pieces_of(state)
    state.engine.close()
    return before, after, left


@pytest.mark.parametrize("zero", [3, *(pytest.param(zero, marks=SLOW) for zero in (1, 2))])
def test_frozen_parameters_stay_as_they_are_and_are_not_left_gathered(zero: int, settings: Callable[..., DeepSpeedConfig]) -> None:
    recipe = recipe_for(zero, train__dtype="bfloat16", parallel__deepspeed=settings(), **FROZEN, **MOE)
    results = run("gloo", 2, frozen_bits, recipe)
    before, after = (gather([one[place] for one in results]) for place in (0, 1))
    frozen = {name.removeprefix("weight/") for name in before if name.startswith("weight/")}
    frozen -= {name.removeprefix("exp_avg/") for name in before}
    assert "embedding.weight" in frozen
    for name in frozen:
        assert before[f"weight/{name}"].tobytes() == after[f"weight/{name}"].tobytes()
        assert f"exp_avg/{name}" not in after
    assert all((one[2] == 0) == (zero == 3) for one in results)


def damaged(communicator: Communicator, recipe: Recipe, what: str) -> tuple[list[list[str]], bool, bool]:
    """Damages a working weight, or a master weight, of rank 1 after two steps; returns what every rank found, whether the repair
    gave the state back that was there before, and whether the next check found nothing."""
    state = fresh(communicator, recipe)
    for step in range(2):
        train_step(state, step)
    before, check = pieces_of(state), DamageCheck(state.engine, state.mesh)
    working = [copy.clone() for shard in state.engine.shards() for copy in shard.copies]
    check.seal()
    if communicator.rank == 1:
        shard = state.engine.shards()[0]
        (shard.copies[0] if what == "working" else shard.tensors["weight"]).view(-1)[3] += 1.0
    check.inspect()
    world = state.mesh.group("world")
    found = [from_json(rows) for rows in gather_json(as_json(check.damages), world)]
    if what == "working":
        check.repair(found)
    again = check.inspect()
    now = [copy for shard in state.engine.shards() for copy in shard.copies]
    same = all(torch.equal(one, other) for one, other in zip(working, now, strict=True))
    same &= all(one[3].tobytes() == other[3].tobytes() for one, other in zip(before, pieces_of(state), strict=True))
    state.engine.close()
    return [[damage.kind for damage in own] for own in found], same, again


@pytest.mark.parametrize(
    ("zero", "dtype"),
    [
        (1, "bfloat16"),
        (3, "float32"),
        *(pytest.param(*one, marks=SLOW) for one in ((1, "float32"), (2, "float32"), (3, "bfloat16"))),
    ],
)
def test_the_guard_finds_damage_and_repairs_working_weights(
    zero: int, dtype: str, settings: Callable[..., DeepSpeedConfig]
) -> None:
    recipe = recipe_for(zero, train__dtype=dtype, parallel__deepspeed=settings())
    for found, same, again in run("gloo", 2, damaged, recipe, "working"):
        assert found == [[], ["copy"]]
        assert same
        assert not again
    for found, *_ in run("gloo", 2, damaged, recipe, "master"):
        assert found[0] in ([], ["copy"])  # its copies are no longer what rank 1 would make
        assert "state" in found[1]


@pytest.mark.parametrize("zero", [2, *(pytest.param(zero, marks=SLOW) for zero in (1, 3))])
def test_a_step_computed_again_gives_the_same_bits(zero: int, settings: Callable[..., DeepSpeedConfig]) -> None:
    recipe = recipe_for(zero, parallel__deepspeed=settings(), guard__audit_every=2, guard__check_every=1, **BIASED)
    for trained in run("gloo", 2, train, recipe):
        assert trained.attempts == [1, 2, 1, 2, 1]
        assert all(trained.committed)


def beyond_the_end(communicator: Communicator, recipe: Recipe) -> list[bool]:
    """Returns whether what ZeRO-3 adds to parameters that do not divide is 0, in master weights and working weights, where memory
    that was used before held something else."""
    old = [torch.full((size,), torch.nan) for size in range(1, 4096) for _ in range(3)]
    del old
    state = fresh(communicator, recipe)
    used = [sum(count for *_, count in part.shard_entries()) for part in state.engine.optimizer.parts]
    ends = [tensor for shard in state.engine.shards()[: len(used)] for tensor in (shard.tensors["weight"], *shard.copies)]
    state.engine.close()
    answer = [int(tensor.count_nonzero()) <= count for tensor, count in zip(ends, [n for n in used for _ in (0, 1)], strict=True)]
    return [*answer, any(tensor.numel() > count for tensor, count in zip(ends[::2], used, strict=True))]


def test_nothing_but_zeros_lies_beyond_the_end_of_a_parameter(settings: Callable[..., DeepSpeedConfig]) -> None:
    recipe = recipe_for(3, parallel__deepspeed=settings(), data__global_batch=12)
    results = run("gloo", 3, beyond_the_end, recipe)
    assert all(all(one[:-1]) for one in results)
    assert results[-1][-1]


def in_one_process(communicator: Communicator, recipe: Recipe, keys: dict[str, Any]) -> tuple[int, bool]:
    """Builds engines one after the other, of which some train. Returns how many more models DeepSpeed's own list holds afterwards
    than before, and whether it still has groups of ranks."""
    held = []
    for zero, trains in ((3, True), (1, False), (2, True), (3, False)):
        if trains:
            train(communicator, recipe_for(zero, **keys))
        else:
            fresh(communicator, recipe_for(zero, **keys)).engine.close()
        held.append(len(deepspeed_module("runtime.zero.parameter_offload").FWD_MODULE_STACK))
    return held[-1] - held[0], deepspeed_module("utils.groups").mpu is not None


def train_moving(communicator: Communicator, recipe: Recipe) -> tuple[Trained, int, int]:
    """Moves layers before the steps 2, 3 and 4. Returns also the bytes of weights, master weights and gradients that are still
    there of engines whose layers have moved away, and how many threads the moves have started (a process group has three)."""
    gc.collect()  # process groups of earlier tests
    state, before, threads = fresh(communicator, recipe), [], list[int]()
    initial, results = pieces_of(state), []
    for step in range(STEPS):
        if step in (1, 2, 3):
            before += [weakref.ref(tensor.untyped_storage()) for _, tensor in state.engine.held()]
            move(state, split_of(*((1, 3), (3, 1), (2, 2))[step - 1]), step)
        results.append(train_step(state, step))
        threads.append(len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else 0)
    trained = Trained(results, initial, pieces_of(state), state.engine.parameters)
    state.engine.close()
    kept = sum(storage.nbytes() for ref in before if (storage := ref()) is not None)
    return trained, kept, threads[-1] - threads[0]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=SLOW)])
def test_layers_move_and_nothing_is_kept_of_them(dtype: str) -> None:
    layout = {"parallel__pipeline": 2, "parallel__data": 2, "parallel__balance": [2, 2]}
    moved = run("gloo", 4, train_moving, recipe_for(1, **layout, train__dtype=dtype))
    assert [(kept, threads) for _, kept, threads in moved] == [(0, 0)] * 4
    if dtype == "float32":
        assert_same_curve([trained for trained, *_ in moved], alone())


def deepspeed_module(name: str) -> Any:
    return sys.modules[f"deepspeed.{name}"]


def test_engines_follow_one_another_in_a_process(settings: Callable[..., DeepSpeedConfig]) -> None:
    keys = {"parallel__deepspeed": settings()}
    run("gloo", 1, train, recipe_for(3, **keys))  # so that rank 0 has had one more than rank 1
    assert run("gloo", 2, in_one_process, recipe_for(3, **keys), keys) == [(0, False)] * 2


def decorated(communicator: Communicator) -> bool:
    """Whether DeepSpeed has asked torch to compile its own optimizers."""
    load(torch.device("cpu"))
    return hasattr(deepspeed_module("runtime.zero.muon.original_muon").muon_update, "_torchdynamo_orig_callable")


def test_torchs_compiler_is_not_loaded_for_optimizers_that_nobody_uses() -> None:
    assert run("gloo", 1, decorated) == [False]


def reported(communicator: Communicator) -> list[str]:
    """What of DeepSpeed's log reaches the log of this process."""
    load(communicator.device)
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        for level in ("info", "warning", "error"):
            getattr(deepspeed_module("utils").logger, level)("%s of DeepSpeed", level)
    finally:
        logging.getLogger().removeHandler(handler)
    return [*seen, *map(str, deepspeed_module("utils").logger.handlers)]


def test_errors_of_deepspeed_come_to_the_log_and_nothing_else() -> None:
    assert run("gloo", 1, reported) == [["error of DeepSpeed"]]


def configured(communicator: Communicator, recipe: Recipe) -> list[Any]:
    state = fresh(communicator, recipe)
    assert isinstance(state.engine, DeepSpeedEngine)
    engine = state.engine._zeros[0].engine
    names = type(engine.optimizer).__name__, engine.zero_optimization_stage(), engine.zero_reduce_bucket_size()
    answer = [*names, engine.gradient_clipping(), torch.nn.functional.linear.__module__]
    state.engine.close()
    return answer


def test_deepspeed_gets_the_file_s_settings_and_no_clipping(tmp_path: Path) -> None:
    """Its default is to clip at 1.0. ZeRO-3 would also replace torch's linear for the whole process."""
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": 12345}, "gradient_clipping": "auto"}))
    plain = torch.nn.functional.linear.__module__
    for zero, keys, bucket in ((3, {"config": str(path)}, 12345), (2, {}, 4096 // 4)):
        recipe = recipe_for(zero, parallel__deepspeed=DeepSpeedConfig(**keys))
        for name, stage, size, clip, module in run("gloo", 1, configured, recipe):
            assert ("Stage3" in name, stage, size, clip, module) == (zero == 3, zero, bucket, 0.0, plain)
