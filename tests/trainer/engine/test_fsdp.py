"""The engine on torch's FSDP2: it trains the curve of one process, over every axis, and none of FSDP2's traps changes a bit of it.

All over Gloo, since the ranks of `simulated` have no process groups.
"""

import hashlib
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.trainer import rebalance
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.costs.analytic import analytic_table
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.evaluate import validate
from bagualu.trainer.observers import plan_faults
from bagualu.trainer.operators.linear import linears
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import Curve, assert_same, gather, pieces_of, small_recipe, train
from tests.trainer import test_guard, test_rebalance
from tests.trainer.faults import Fault, assert_same_bits, gradient
from tests.trainer.models.reference import unfelt
from tests.trainer.models.styles import STYLES
from tests.trainer.recovery import test_resume
from tests.trainer.states import load_state, save_state
from tests.trainer.test_one_curve import BATCH, MODELS, name_of

STEPS = 3
FROZEN = [{"pattern": name, "frozen": True} for name in ("embedding.weight", "layers.0.*", "layers.1.attention.*")]
FSDP = {"engine": "fsdp", "bucket_bytes": 25 * 2**20}
Case = tuple[str, dict[str, Any], dict[str, Any]]
"""Model, layout, and what else differs from the defaults."""
LAYOUTS: list[Case] = [
    ("dense", {"data": 2}, {"optim__name": "muon"}),
    ("dense_tied", {"data": 2, "pipeline": 2}, {}),
    ("dense_tied_padded", {"data": 2, "tensor": 2, "sequence": True}, {}),
    ("dense_5_layers_gqa", {"data": 2, "pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2},
     {"optim__name": "sgd"}),
    ("moe_tied", {"data": 4, "expert": 2}, {}),
    ("moe_tied_5_layers", {"data": 2, "expert": 2, "pipeline": 2, "balance": [2.5, 2.5]}, {}),
    ("moe", {"data": 2, "expert": 2}, {"optim__name": "lion"}),  # each expert on a single rank
    ("moe", {"data": 3}, {"data__global_batch": 6}),  # nothing divides over three ranks, the third has no experts
    ("moe", {"data": 4}, {"model__moe__experts": 2}),  # fewer experts than ranks: their columns are divided
    ("dense", {"data": 4, "shard": 2}, {"optim__groups": FROZEN}),
    ("moe_tied", {"data": 4, "expert": 2, "shard": 2}, {"train__recompute": "full"}),
    ("moe_tied", {"data": 4, "expert": 2}, {"train__recompute": "experts", "train__offload_bytes": 2**20}),
    ("bloom", {"data": 2, "tensor": 2, "sequence": True}, {"train__recompute": "full"}),
    ("qwen3_moe", {"data": 2, "tensor": 2}, {}),
]  # fmt: skip
MANY: list[Case] = [
    ("dense_tied_padded", {"data": 2, "tensor": 2, "sequence": True}, {"optim__name": "muon"}),
    ("moe_tied", {"data": 4, "expert": 2}, {"optim__name": "muon"}),
    ("moe", {"data": 4}, {"optim__name": "muon", "model__moe__experts": 2}),
    ("dense_tied", {"data": 2, "pipeline": 2}, {"optim__name": "muon"}),
    ("moe_tied_5_layers", {"data": 2, "pipeline": 2, "schedule": "interleaved_1f1b", "balance": [1.5, 1, 1, 1.5]},
     {"train__recompute": "full"}),
    ("moe_tied", {"data": 4, "expert": 2, "shard": 2}, {"optim__name": "muon", "optim__groups": FROZEN}),
    ("dense", {"data": 1}, {}),
    ("dense", {"data": 8}, {}),
    ("dense_tied", {"data": 8, "shard": 4}, {"optim__name": "lion"}),
    ("dense", {"data": 4, "pipeline": 2, "schedule": "gpipe"}, {"train__recompute": "full"}),
    ("dense_tied", {"data": 2, "pipeline": 4}, {"optim__groups": FROZEN}),
    ("moe_tied", {"data": 2, "expert": 2, "pipeline": 2}, {"train__recompute": [1, 2], "train__offload_bytes": 4000}),
    ("dense", {"data": 2, "tensor": 2, "sequence": True}, {"train__recompute": "attention", "train__offload_bytes": 2**20}),
    ("dense_tied", {"data": 2, "pipeline": 2, "tensor": 2, "sequence": True}, {"optim__name": "sgd"}),
    ("dense_tied", {"data": 2, "schedule": "interleaved_1f1b", "virtual_stages": 3}, {}),
    ("dense_tied", {"data": 4, "shard": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2}, {}),
    ("dense_tied_padded", {"data": 2, "tensor": 4}, {"optim__groups": FROZEN}),
    ("dense_tied_padded", {"data": 2, "pipeline": 3}, {}),
    ("moe", {"data": 4, "expert": 4}, {}),
    ("moe", {"data": 4, "expert": 2, "tensor": 2}, {"optim__groups": FROZEN}),
    ("moe", {"data": 8, "expert": 2, "shard": 4}, {}),
    ("moe_tied", {"data": 8, "expert": 4, "shard": 2}, {"optim__name": "sgd"}),
    ("moe_tied", {"data": 4, "expert": 2, "pipeline": 2, "shard": 2}, {}),
    ("moe_tied", {"data": 2, "expert": 2, "tensor": 2, "pipeline": 2, "sequence": True}, {"train__recompute": "full"}),
    ("moe_everywhere_5_layers", {"data": 8, "expert": 4}, {}),
    ("moe_tied_5_layers", {"data": 2, "expert": 2, "tensor": 2, "sequence": True, "pipeline": 2,
                           "schedule": "interleaved_1f1b"}, {}),
    *((style, {"data": 2, "tensor": 2, "sequence": True}, {}) for style in STYLES),
    *((style, {"data": 2, "pipeline": 2}, {}) for style in STYLES),
    ("moe_tied_9_layers", {"data": 4, "pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 4, "shard": 2}, {}),
]  # fmt: skip


def settings(model: str, layout: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    shape = {f"model__{key}": value for key, value in MODELS[model].items()}
    return {**shape, **{f"parallel__{key}": value for key, value in layout.items()}, **changes}


def recipe_for(model: str, layout: dict[str, Any], **changes: Any) -> Recipe:
    return small_recipe(**settings(model, {**FSDP, **layout}, changes))


def state_of(communicator: Communicator, recipe: Recipe) -> TrainerState:
    return assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))


CURVES: dict[str, Curve] = {}


def alone(model: str, changes: dict[str, Any]) -> Curve:
    """The curve of one process with the native engine that takes the whole batch at once."""
    key = f"{model} {changes}"
    if key not in CURVES:
        micro_batch = changes.get("data__global_batch", BATCH)
        recipe = small_recipe(**settings(model, {}, {**changes, "train__micro_batch": micro_batch}))
        CURVES[key] = run("simulated", 1, train, recipe, STEPS)[0]
    return CURVES[key]


@pytest.mark.parametrize(
    ("model", "layout", "changes"),
    [*LAYOUTS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MANY)],
    ids=[f"{model}-{name_of(layout)}-{name_of(changes)}"[:80] for model, layout, changes in [*LAYOUTS, *MANY]],
)
def test_layout_trains_the_curve_of_one_process(model: str, layout: dict[str, Any], changes: dict[str, Any]) -> None:
    in_replica = changes.get("data__global_batch", BATCH) // layout["data"]
    micro_batch = 2 if in_replica >= 2 * layout.get("pipeline", 1) else 1
    recipe = recipe_for(model, layout, **{**changes, "train__micro_batch": micro_batch})
    curves = run("gloo", recipe.world_size(), train, recipe, STEPS)
    assert_same(curves, [alone(model, changes)], unfelt=".key.bias" if unfelt(recipe.model) else None)


def train_with_a_rare_expert(communicator: Communicator, recipe: Recipe) -> Curve:
    """Every token chooses expert 3 in steps 1 and 4, none in the others."""
    state = state_of(communicator, recipe)
    initial, results = pieces_of(state), []
    for step in range(5):
        for _, biases in state.engine.model.named_buffers():
            biases[3] = 2.0 if step in (0, 3) else -2.0
        results.append(train_step(state, step))
        loads = state.engine.model._loads.values()
        assert all((load[3] > 0) == (step in (0, 3)) for load in loads)
    figures = [[r.loss for r in results], [r.balance_loss for r in results], [r.grad_norm for r in results]]
    return Curve(*figures, pieces_of(state), initial)


@pytest.mark.parametrize(
    "layout",
    [{"data": 2}, {"data": 4, "expert": 2}, pytest.param({"data": 2, "expert": 2, "pipeline": 2}, marks=pytest.mark.slow)],
    ids=name_of,
)
def test_an_expert_that_gets_tokens_in_two_steps_only_trains_as_in_one_process(layout: dict[str, Any]) -> None:
    expected = run("simulated", 1, train_with_a_rare_expert, small_recipe(**settings("moe_tied", {}, {})))
    recipe = recipe_for("moe_tied", layout, train__micro_batch=2 if "pipeline" not in layout else 1)
    assert_same(run("gloo", recipe.world_size(), train_with_a_rare_expert, recipe), expected)


def use_one_half(state: TrainerState, which: int) -> None:
    block: Any = state.engine.model.layers["0"].feed_forward
    used = (block.gate, block.up)[which]
    block.forward = lambda x: linears(F.silu(linears(x, used.weight)[0]), block.down.weight)[0]


def train_using_other_halves(communicator: Communicator, recipe: Recipe) -> Curve:
    """Each rank leaves one of two matrices of the same shape out of its first layer, and has no gradient for it."""
    state = state_of(communicator, recipe)
    use_one_half(state, communicator.rank)
    initial, results = pieces_of(state), [train_step(state, step) for step in range(STEPS)]
    return Curve([r.loss for r in results], [0.0] * STEPS, [r.grad_norm for r in results], pieces_of(state), initial)


def test_a_parameter_that_only_some_ranks_use_gets_the_gradients_of_these_alone() -> None:
    """FSDP2 would send what there is, of either matrix, and add the two up without an error."""
    expected = run("gloo", 2, train_using_other_halves, small_recipe(parallel__data=2))
    assert_same(run("gloo", 2, train_using_other_halves, recipe_for("dense", {"data": 2})), expected)


def with_reductions_of_a_part(communicator: Communicator, recipe: Recipe) -> str:
    """Each rank leaves another matrix out, and FSDP2 does not fill in the zeros of what has no gradient. Returns the error."""
    state = state_of(communicator, recipe)
    for unit in state.engine.units:
        unit.module.set_reduce_scatter_unused_params(False)
    use_one_half(state, communicator.rank)
    with pytest.raises(RuntimeError) as error:
        train_step(state, 0)
    return str(error.value)


def test_gradients_of_different_parameters_are_never_added_to_each_other() -> None:
    for text in run("gloo", 2, with_reductions_of_a_part, recipe_for("dense", {"data": 2})):
        assert "a parameter has no gradient on this rank" in text


def losses_around_an_update(communicator: Communicator, recipe: Recipe) -> list[float]:
    """Validation losses: of the initial weights, after a step, and of the initial weights, which are loaded again."""
    state = state_of(communicator, recipe)
    saved = {(piece.name, piece.offset): piece.tensor.clone() for piece in state.engine.pieces()}
    losses = [validate(state)]
    train_step(state, 0)
    losses.append(validate(state))
    incoming = state.engine.incoming()
    for piece in incoming.pieces():
        piece.tensor.copy_(saved[piece.name, piece.offset])
    incoming.apply(0)
    losses.append(validate(state))
    assert all(losses)
    return [loss.loss for loss in losses if loss]


@pytest.mark.parametrize(
    ("model", "layout"), [("dense", {"data": 2}), ("dense_tied", {"data": 2}), ("dense", {"data": 2, "pipeline": 2})]
)
def test_weights_that_a_validation_gathered_are_not_used_after_they_have_changed(model: str, layout: dict[str, Any]) -> None:
    recipe = recipe_for(model, layout, train__validation_sequences=4)
    for before, after, again in run("gloo", recipe.world_size(), losses_around_an_update, recipe):
        assert before == again != after


def first_norm(communicator: Communicator, recipe: Recipe) -> tuple[float, list[Any]]:
    """The gradient norm of the first step, and the master weights with which it begins."""
    state = state_of(communicator, recipe)
    return train_step(state, 0).grad_norm, pieces_of(state_of(communicator, recipe))


def test_gradients_of_16_bit_weights_are_summed_in_float32_and_masters_begin_as_the_weights() -> None:
    """Over micro-batches, over ranks, and where a kernel computes in float32."""
    changes = {"train__dtype": "bfloat16", "data__global_batch": 32}
    native = run("gloo", 2, first_norm, small_recipe(**settings("dense_tied", {"data": 2}, changes)))
    found = run("gloo", 2, first_norm, recipe_for("dense_tied", {"data": 2}, **changes))
    np.testing.assert_allclose([norm for norm, _ in found], [norm for norm, _ in native], rtol=1e-6)
    assert hashes(gather([pieces for _, pieces in found])) == hashes(gather([pieces for _, pieces in native]))


def frozen_and_gathered(communicator: Communicator, recipe: Recipe) -> tuple[bool, list[str], list[list[str]]]:
    """Whether frozen weights are as they were; which parameters have a gradient though frozen; whose weights this rank still has
    after the backward passes of a step, and after the step."""
    state = state_of(communicator, recipe)
    engine = state.engine
    before, norm_squared = [part.tensor.clone() for part in engine.untrained], engine.norm_squared
    gathered: list[list[str]] = []

    def look() -> torch.Tensor:
        gathered.append([name for name, leaf in engine.leaves() if leaf.untyped_storage().nbytes()])
        return norm_squared()

    engine.norm_squared = look
    train_step(state, 0)
    validate(state)
    train_step(state, 1)
    look()
    assert {tensor.dtype for tensor in before} == {torch.bfloat16}, "frozen weights need no masters"
    same = all(torch.equal(part.tensor, old) for part, old in zip(engine.untrained, before, strict=True))
    return same, [name for name, leaf in engine.leaves() if leaf.grad is not None and not leaf.requires_grad], gathered


@pytest.mark.parametrize("layout", [{"data": 2}, {"data": 2, "pipeline": 2}], ids=name_of)
def test_frozen_weights_stay_as_they_are_and_no_rank_keeps_weights_of_others(layout: dict[str, Any]) -> None:
    recipe = recipe_for("dense_tied", layout, train__dtype="bfloat16", optim__groups=FROZEN)
    assert run("gloo", recipe.world_size(), frozen_and_gathered, recipe) == [(True, [], [[]] * 3)] * recipe.world_size()


def most_at_the_start(communicator: Communicator, recipe: Recipe) -> tuple[int, int, int]:
    """Bytes that this rank allocates to build its engine: the most at a time, those that stay, and those of its largest unit."""
    corpus = prepare(recipe.data, recipe.model.vocab)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        state = assemble(recipe, communicator, corpus)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    leaves = dict(state.engine.leaves())
    return most, now, max(sum(leaves[name].nbytes for name in unit.names) for unit in state.engine.units)


def test_a_rank_never_holds_more_than_one_unit_of_weights_before_they_are_divided() -> None:
    """One that was drawn, its copy in another dtype, and the same once more for the ranks' gather."""
    changes = {"model__hidden": 64, "model__ffn": 256, "train__dtype": "float32", "optim__name": "sgd", "optim__momentum": 0.0}
    recipe = recipe_for("dense_8_layers", {"data": 4}, **changes)
    for most, stay, unit in run("gloo", 4, most_at_the_start, recipe):
        assert most - stay < 3 * unit


def state_held(communicator: Communicator, recipe: Recipe) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer that this rank has in a step, and what the cost table says."""
    state = state_of(communicator, recipe)
    engine, gathered, work = state.engine, [0], work_of(recipe, state.mesh.layout)
    divided = {name for unit in engine.units for name in unit.names}
    leaves = [leaf for name, leaf in engine.leaves() if name in divided]
    engine.before_reduction = lambda _: gathered.append(sum(leaf.untyped_storage().nbytes() for leaf in leaves))
    train_step(state, 0)
    held = max(gathered) if state.mesh.placement.stages > 1 else 0
    for part, shard in zip(engine.parts, engine.optimizer.shards(), strict=True):
        tensors = [
            part.shard_weights,
            part.shard_gradients,
            *(tensor for kind, tensor in shard.items() if kind not in ("weight", "step")),
        ]
        tensors += [shard["weight"]] if shard["weight"].dtype != part.shard_weights.dtype else []
        held += sum(tensor.nbytes for tensor in tensors)
    held += sum(part.tensor.nbytes for part in engine.untrained)
    table = analytic_table(work)
    said = sum(table.layers[layer].state_bytes for layer in map(int, engine.model.layers))
    said += table.embedding.state_bytes * state.mesh.first_stage + table.head.state_bytes * state.mesh.last_stage
    angles = 2 * recipe.data.sequence_length * recipe.model.head_width * work.accurate_bytes
    return held, said - angles * len(engine.model.layers)


@pytest.mark.parametrize(
    ("model", "layout", "changes"),
    [
        ("dense", {"data": 2}, {"train__dtype": "float32"}),
        (
            "moe",
            {"data": 2, "expert": 2},
            {"train__dtype": "bfloat16", "optim__groups": FROZEN, "optim__moments_dtype": "bfloat16"},
        ),
        ("dense_tied", {"data": 2, "pipeline": 2}, {"train__dtype": "bfloat16", "optim__groups": FROZEN[1:]}),
        ("dense", {"data": 4, "shard": 2}, {}),
    ],
    ids=["one stage", "experts on single ranks", "pipeline", "two copies"],
)
def test_the_cost_table_counts_what_a_rank_holds(model: str, layout: dict[str, Any], changes: dict[str, Any]) -> None:
    recipe = recipe_for(model, layout, train__micro_batch=2, **changes)
    for held, said in run("gloo", recipe.world_size(), state_held, recipe):
        assert held == said


class Calls:
    """Counts a rank's collectives."""

    def __init__(self) -> None:
        self.counts = Counter[str]()

    def at(self, point: str, step: int) -> None:
        return None

    def waits(self, what: str | None) -> None:
        self.counts[what or ""] += 1


def collectives(communicator: Communicator, recipe: Recipe) -> tuple[int, int, int]:
    """In a step: the gathers of weights and the reductions of gradients among ranks that share a copy of them, and over copies."""
    state, calls, over_copies, all_reduce = state_of(communicator, recipe), Calls(), 0, dist.all_reduce
    copies = state.mesh.group("fold_copies").process_group if recipe.parallel.shard else None

    def counting(*given: Any, **options: Any) -> Any:
        nonlocal over_copies
        over_copies += copies is not None and any(one is copies for one in (*given, *options.values()))
        return all_reduce(*given, **options)

    train_step(state, 0)
    communicator.monitor.observers.append(calls)
    dist.all_reduce = counting
    train_step(state, 1)
    dist.all_reduce = all_reduce
    axis = "fold_shard" if copies else "fold"
    return calls.counts[f"all_gather in {axis}"], calls.counts[f"reduce_scatter in {axis}"], over_copies


def test_weights_are_gathered_for_each_pass_of_a_single_stage_and_once_a_step_in_a_pipeline() -> None:
    """The model has 4 layers and two ends, and a rank 4 or 2 micro-batches. The head's weights stay until its backward pass; the
    embedding's backward pass does not need them. Gradients are summed over copies of the weights once a step."""
    assert run("gloo", 2, collectives, recipe_for("dense", {"data": 2})) == [(4 * (2 * 4 + 2), 4 * 6, 0)] * 2
    assert run("gloo", 4, collectives, recipe_for("dense", {"data": 2, "pipeline": 2})) == [(2 + 1, 4 * 3, 0)] * 4
    assert run("gloo", 4, collectives, recipe_for("dense", {"data": 4, "shard": 2})) == [(2 * (2 * 4 + 2), 2 * 6, 6)] * 4


GUARDED: list[tuple[dict[str, Any], Fault, bool]] = [  # layout, fault, whether the run goes back to a checkpoint
    ({"data": 2}, gradient(), False),
    ({"data": 2, "pipeline": 2}, Fault("weight", rank=3), True),
    ({"data": 4, "shard": 2}, Fault("exp_avg", rank=3), False),  # the rank with the same part of the other copy repairs it
]
MORE_GUARDED = [({"data": 2}, gradient("nan"), False), ({"data": 2}, Fault("exp_avg"), True)]


@pytest.mark.parametrize(
    ("layout", "fault", "back"),
    [*GUARDED, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_GUARDED)],
    ids=lambda value: str(value).replace(" ", "")[:60],
)
def test_after_a_fault_the_run_is_the_one_without_it(tmp_path: Path, layout: dict[str, Any], fault: Fault, back: bool) -> None:
    changes = {f"parallel__{key}": value for key, value in {**FSDP, **layout}.items()}
    recipe = test_guard.recipe_in(tmp_path, "data", checkpoint__every=3, checkpoint__keep=4, **changes)
    found = test_guard.runs("gloo", recipe, fault)
    assert found[0].error == ""
    assert_same_bits(found, test_guard.straight("gloo", "data", test_guard.STEPS, **changes))
    assert found[0].guard["rolled_back"] == back
    if not back:
        assert found[0].line(test_guard.BAD)["ranks"] == [fault.rank]


def train_under_faults(communicator: Communicator, recipe: Recipe) -> tuple[Curve, list[tuple[int, ...]]]:
    """The curve, and the ranks that the guard found at fault in each step."""
    state = state_of(communicator, recipe)
    plan_faults(state, communicator, None)
    initial, results = pieces_of(state), [train_step(state, step) for step in range(STEPS)]
    curve = Curve([r.loss for r in results], [0.0] * STEPS, [r.grad_norm for r in results], pieces_of(state), initial)
    return curve, [result.verdict.ranks for result in results]


def test_planned_faults_strike_what_a_backward_pass_computes(tmp_path: Path) -> None:
    faults = ["nan@step=2:rank=1", "flip@step=3:rank=0:what=gradient"]
    changes = {"run__dir": str(tmp_path), "faults": faults, "guard__audit_every": 1, "train__micro_batch": 2}
    found = run("gloo", 2, train_under_faults, recipe_for("dense", {"data": 2}, **changes))
    assert_same([curve for curve, _ in found], [alone("dense", {})])
    assert [ranks for _, ranks in found] == [[(), (1,), (0,)]] * 2


@pytest.mark.parametrize(
    ("model", "layout", "changes"),
    [
        ("dense_tied_5_layers", {"data": 2, "pipeline": 2}, {"train__dtype": "float16"}),
        ("moe_tied", {"data": 4, "expert": 2, "shard": 2}, {"train__dtype": "bfloat16", "optim__moments_dtype": "bfloat16"}),
    ],
)
def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path, model: str, layout: dict[str, Any], changes: dict[str, Any]) -> None:
    recipe = test_resume.recipe_for(tmp_path, model, {**FSDP, **layout}, **changes)
    for straight, at_end, at_stop, after_loading, results, end in run(
        "gloo", recipe.world_size(), test_resume.in_two_halves, recipe
    ):
        assert repr(results) == repr(straight)
        test_resume.assert_equal_bits(after_loading, at_stop)
        test_resume.assert_equal_bits(end, at_end)


def loaded_and_saved(communicator: Communicator, recipe: Recipe, done: int) -> list[Any]:
    """The state before and after a step from the newest checkpoint, which is then saved."""
    state = state_of(communicator, recipe)
    if done:
        path = latest(Path(recipe.run.dir) / "checkpoints")
        assert path is not None
        assert load_state(state, path) == done
    before = pieces_of(state)
    train_step(state, done)
    save_state(state, done + 1)
    return [before, pieces_of(state)]


CHAINS = [
    ("native", "fsdp", "native"),
    ("fsdp", "native", "fsdp"),
    pytest.param(("fsdp", "fsdp", "fsdp"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("engines", CHAINS, ids="-".join)
def test_a_run_changes_engine_and_ranks_at_a_checkpoint(tmp_path: Path, engines: tuple[str, ...]) -> None:
    """On 2, 4 and 1 ranks: every weight and moment is read as it was written, and the curve is that of one process."""
    saved = None
    for done, (engine, ranks) in enumerate(zip(engines, (2, 4, 1), strict=True)):
        layout = {"data": ranks, "expert": 2 if ranks == 4 else 1, **(FSDP if engine == "fsdp" else {})}
        recipe = small_recipe(**settings("moe_tied", layout, {"run__dir": str(tmp_path), "train__micro_batch": 2}))
        found = run("gloo", ranks, loaded_and_saved, recipe, done)
        before, after = (gather([rank[which] for rank in found]) for which in (0, 1))
        assert saved is None or hashes(before) == hashes(saved)
        saved = after
    expected = gather([alone("moe_tied", {}).pieces])
    assert saved is not None
    assert saved.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(saved[name], values, rtol=1e-9, atol=1e-9 * np.abs(values).max(), err_msg=name)


def hashes(tensors: dict[str, np.ndarray]) -> dict[str, str]:
    return {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in tensors.items()}


INTERLEAVED = {"pipeline": 2, "data": 2, "expert": 2, "schedule": "interleaved_1f1b"}
MOVES = [
    ({"pipeline": 2, "data": 2}, [(3, 4), (6, 1), (1, 6)]),
    pytest.param(INTERLEAVED, [(2, 2, 2, 1), (4, 1, 1, 1), (1, 1, 1, 4)], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "splits"), MOVES, ids=lambda case: "-".join(map(str, case)).replace(" ", "")[:60])
def test_layers_move_as_with_the_native_engine(layout: dict[str, Any], splits: list[tuple[int, ...]]) -> None:
    expected = run("simulated", 1, train, test_rebalance.recipe_for(), 3)
    recipe = test_rebalance.recipe_for(**{**FSDP, **layout}, balance=list(splits[0]))
    moving = [test_rebalance.split_of(*counts) for counts in splits]
    assert_same(run("gloo", recipe.world_size(), test_rebalance.train_moving, recipe, moving), expected)


def leaking(communicator: Communicator, recipe: Recipe) -> int:
    """The bytes of weights, masters and gradients that are still there of engines whose layers have moved away."""
    state, before = state_of(communicator, recipe), []
    for step, counts in enumerate(((5, 2), (2, 5), (3, 4))):
        train_step(state, step)
        before += [weakref.ref(part.shard_weights.untyped_storage()) for part in state.engine.parts]
        before += [weakref.ref(leaf.untyped_storage()) for _, leaf in state.engine.leaves()]
        rebalance.move(state, test_rebalance.split_of(*counts), step + 1)
    return sum(storage.nbytes() for ref in before if (storage := ref()) is not None)


def test_no_memory_is_kept_of_layers_that_have_moved_away() -> None:
    assert run("gloo", 4, leaking, test_rebalance.recipe_for(**FSDP, pipeline=2, data=2, balance=[3, 4])) == [0] * 4


def without_process_groups(communicator: Communicator) -> str:
    with pytest.raises(RecipeError) as error:
        _ = communicator.world.process_group
    return str(error.value)


def test_a_backend_without_process_groups_is_refused_with_the_engine_that_needs_none() -> None:
    assert all("give parallel.engine=native" in text for text in run("simulated", 2, without_process_groups))
