"""Weights and moments that are not finite: never committed, never saved, never loaded, whatever made them so."""

import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError
from bagualu.fault_tolerance.config import GuardConfig
from bagualu.fault_tolerance.guard.finite import after_update, is_finite
from bagualu.fault_tolerance.guard.verdict import GuardAction
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.optim import sharded
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recovery.saving import Checkpoints, take_checkpoints
from tests.harness import run
from tests.parity import gather, small_recipe
from tests.parity import train as curve
from tests.trainer.faults import Ending, Fault, assert_same_bits, train
from tests.trainer.states import load_state, save_state

STEPS, BAD = 7, 5
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero_1": {"parallel__data": 2, "train__dtype": "float32"},
    "zero_0": {"parallel__data": 2, "parallel__zero": 0},
    "tensor": {"parallel__tensor": 2, "train__dtype": "bfloat16"},
    "pipeline": {"parallel__pipeline": 2, "train__dtype": "float32", "model__tie_embeddings": True},
}


def recipe_in(folder: Path, layout: str, **changes: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "run__dir": str(folder), "train__steps": STEPS, "train__validation_sequences": 0, "optim__schedule": "constant",
        "checkpoint__every": 3, "checkpoint__keep": 4, "guard__check_every": 0, "model__layers": 2, "data__global_batch": 4,
        **LAYOUTS[layout],
    }  # fmt: skip
    return small_recipe(**{**defaults, **changes})


def runs(recipe: Recipe, fault: Fault | None = None, backend: str = "simulated") -> list[Ending]:
    endings: list[Ending] = run(backend, recipe.world_size(), train, recipe, fault)
    for ending in endings:
        assert (ending.error, ending.guard, repr(ending.lines)) == (endings[0].error, endings[0].guard, repr(endings[0].lines))
    return endings


@cache
def straight(layout: str) -> list[Ending]:
    """A run that nothing happens to."""
    with TemporaryDirectory() as folder:
        return runs(recipe_in(Path(folder), layout))


def finite(endings: list[Ending]) -> bool:
    """Whether all that the next step would depend on is finite, on all ranks."""
    arrays = [array for ending in endings for array in ending.bits.values() if array.dtype.kind == "f"]
    return all(math.isfinite(value) for array in arrays for value in array.flatten().tolist())


DAMAGE = [("exp_avg", "nan"), ("exp_avg", "-inf"), ("exp_avg_sq", "inf"), ("exp_avg_sq", "nan"), ("exp_avg_sq", "-1"),
          ("weight", "nan"), ("weight", "inf")]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "where", "how"),
    [
        pytest.param(layout, *damage, marks=[pytest.mark.slow] * ((row + column) % 2))
        for row, layout in enumerate(LAYOUTS)
        for column, damage in enumerate(DAMAGE)
    ],
)
def test_state_that_is_damaged_right_before_the_update_leaves_no_trace(tmp_path: Path, layout: str, where: str, how: str) -> None:
    """It comes from another rank that holds the same, or from a checkpoint; no samples are left out for it. Every second case is
    slow, so that each damage, and each layout, has half of the others."""
    found = runs(recipe_in(tmp_path / "found", layout), Fault(where, how, point="optimizer", step=BAD))
    assert found[0].error == ""
    assert_same_bits(found, straight(layout))
    assert [line["step"] for line in found[0].lines] == list(range(1, STEPS + 1))
    assert found[0].guard["skipped_steps"] == []
    if layout == "zero_0":
        assert found[0].guard["rolled_back"] == 0
        assert found[0].line(BAD)["cause"] == "weights or moments not finite after the update"
        assert found[0].line(BAD)["ranks"] == [1]
    elif layout != "pipeline":  # there the first bucket may be the tied one, which both ends hold
        assert found[0].guard["rolled_back"] == 1


@pytest.mark.parametrize("layout", ["zero_1", "zero_0", "tensor"])
def test_a_momentum_that_spoils_the_update_of_a_whole_matrix_leaves_no_trace(tmp_path: Path, layout: str) -> None:
    """The rank that makes the matrix orthogonal spoils it for all that hold a part."""
    changes = {"optim__name": "muon"}
    found = runs(recipe_in(tmp_path / "found", layout, **changes), Fault("momentum_buffer", "nan", point="optimizer", step=BAD))
    assert found[0].error == ""
    assert found[0].guard["rolled_back"] == 1
    assert_same_bits(found, runs(recipe_in(tmp_path / "straight", layout, **changes)))


def test_the_same_over_processes(tmp_path: Path) -> None:
    found = runs(recipe_in(tmp_path / "found", "zero_1"), Fault("exp_avg_sq", "inf", point="optimizer", step=BAD), "gloo")
    assert (found[0].error, found[0].guard["rolled_back"]) == ("", 1)
    assert_same_bits(found, runs(recipe_in(tmp_path / "straight", "zero_1"), None, "gloo"))


def test_what_happens_again_after_a_return_ends_the_run_with_the_keys_to_change(tmp_path: Path) -> None:
    fault = Fault("exp_avg", "nan", point="optimizer", step=BAD, always=True)
    found = runs(recipe_in(tmp_path, "zero_1"), fault)
    assert f"step {BAD}: weights or moments not finite after the update: rank 1: weight of" in found[0].error
    assert "this is not the first time" in found[0].error
    assert "lower optim.lr or raise optim.epsilon" in found[0].error
    assert found[0].saved == ["step-00000003"]
    assert found[0].guard["rolled_back"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__lr": 3e38, "optim__weight_decay": 0.0},
        {"optim__lr": 1e30, "optim__weight_decay": 0.0, "optim__epsilon": 2e-38, "optim__clip_norm": 0.0},
        {"optim__lr": 1e5, "train__dtype": "float16", "optim__weight_decay": 0.0},
    ],
)
@pytest.mark.parametrize("layout", ["zero_1", "zero_0"])
def test_settings_that_overflow_end_the_run_and_nothing_of_it_is_saved(
    tmp_path: Path, layout: str, changes: dict[str, object]
) -> None:
    recipe = recipe_in(tmp_path, layout, **{"train__dtype": "float32", "guard__on_spike": "skip", **changes})
    found = runs(recipe)
    assert "not finite" in found[0].error
    assert "lower optim.lr" in found[0].error
    assert found[0].saved == []


def test_policies() -> None:
    def action(repairable: bool = False, again: bool = False, setbacks: int = 0, **changes: str) -> GuardAction:
        return after_update(GuardConfig(**changes), repairable, again, setbacks)  # type: ignore[arg-type]

    assert action() is GuardAction.ROLLBACK
    assert action(again=True) is GuardAction.STOP
    assert action(setbacks=5) is GuardAction.STOP
    assert action(on_nonfinite="stop") is GuardAction.STOP
    assert action(on_nonfinite="skip") is GuardAction.ROLLBACK, "what the update has overwritten cannot be skipped"
    assert action(repairable=True, again=True) is GuardAction.COMMIT
    assert action(repairable=True, on_disagreement="stop") is GuardAction.STOP
    assert action(repairable=True, on_disagreement="rollback") is GuardAction.ROLLBACK


def spoilt_between(communicator: Communicator, recipe: Recipe, last: bool) -> str:
    """Damage after the update, right before the state is saved."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    checkpoints = Checkpoints(state, take_checkpoints(state))
    if communicator.rank == communicator.size - 1:
        state.engine.optimizer.shards()[0]["exp_avg_sq"][0] = torch.inf
    try:
        (checkpoints.save_last if last else checkpoints.save)(1)
        checkpoints.finish()
    except CheckpointError as error:
        return str(error)
    finally:
        checkpoints.close()
    return str(checkpoints.failed)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, asynchronous: bool) -> None:
    recipe = recipe_in(tmp_path, "zero_1", checkpoint__asynchronous=asynchronous)
    assert run("simulated", 2, spoilt_between, recipe, False) == ["1", "1"]
    (said, _) = run("simulated", 2, spoilt_between, recipe, True)
    assert "exp_avg_sq/" in said
    assert "not finite" in said
    assert list_checkpoints(tmp_path / "checkpoints") == []


def saved_by_an_older_version(communicator: Communicator, recipe: Recipe) -> None:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    state.engine.optimizer.shards()[0]["weight"][0] = torch.nan
    save_state(state, 1)


def read(communicator: Communicator, recipe: Recipe) -> bool:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    with pytest.raises(CheckpointError, match="not finite"):
        load_state(state, Path(recipe.run.dir) / "checkpoints" / "step-00000001")
    return all(is_finite(tensor) for shard in state.engine.optimizer.shards() for tensor in shard.values())


def test_what_is_not_finite_is_not_loaded(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, "zero_1")
    run("simulated", 2, saved_by_an_older_version, recipe)
    assert run("simulated", 2, read, recipe) == [True, True]


def test_large_shards_are_updated_in_pieces_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_in(tmp_path, "zero_0", parallel__data=1, train__dtype="float64")
    whole = gather([one.pieces for one in run("simulated", 1, curve, recipe, 3)])
    monkeypatch.setattr(sharded, "PIECE", 24)
    pieces = gather([one.pieces for one in run("simulated", 1, curve, recipe, 3)])
    for name, values in whole.items():
        assert abs(pieces[name] - values).max() <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_value_among_many_is_seen(dtype: torch.dtype) -> None:
    values = torch.ones(100_003, dtype=dtype)
    assert is_finite(values)
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 50_001, 100_002):
            values[place] = bad
            assert not is_finite(values)
            values[place] = 1
    values[:2] = torch.tensor([math.inf, -math.inf])
    assert not is_finite(values)
    assert is_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)), "the sum alone is infinite"
    assert is_finite(torch.empty(0, dtype=dtype))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"optim__epsilon": 0.0}, r"optim\.epsilon=0\.0 .* give optim\.epsilon=1e-08"),
    ({"optim__epsilon": 1e-50}, r"optim\.epsilon=1e-50 .*float32.* give optim\.epsilon=1e-08"),
    ({"optim__epsilon": 1e-40, "train__dtype": "bfloat16"}, r"optim\.epsilon=1e-40 .*float32"),
    ({"optim__epsilon": 1e-320, "train__dtype": "float64"}, r"optim\.epsilon=1e-320 .*float64"),
    ({"optim__lr": 1e39}, r"optim\.lr=1e\+39 .*float32"),
    ({"optim__lr": 1e-50}, r"optim\.lr=1e-50 .*float32"),
    ({"optim__lr": math.nan}, r"optim\.lr=nan is not a finite number"),
    ({"optim__lr": math.inf}, r"optim\.lr=inf is not a finite number"),
    ({"optim__betas": [0.9, math.nan]}, r"optim\.betas=\[0\.9, nan\]"),
    ({"optim__clip_norm": math.nan}, r"optim\.clip_norm=nan"),
    ({"optim__clip_norm": 1e-50}, r"optim\.clip_norm=1e-50"),
    ({"optim__weight_decay": 1e39}, r"optim\.weight_decay=1e\+39"),
    ({"optim__lr": 1.0, "optim__weight_decay": 5.0}, r"optim\.lr=1\.0 times optim\.weight_decay=5\.0 .* give smaller ones"),
    ({"model__initial_std": 1e38}, r"model\.initial_std=1e\+38"),
    ({"model__initial_std": 1e4, "train__dtype": "float16"}, r"model\.initial_std=10000\.0 .*float16"),
    ({"model__norm_epsilon": 1e-50}, r"model\.norm_epsilon=1e-50"),
    ({"model__moe__experts": 4, "model__moe__balance_loss": math.nan}, r"model\.moe\.balance_loss=nan"),
    ({"guard__spike_factor": math.inf}, r"guard\.spike_factor=inf"),
    ({"comm__timeout_seconds": math.nan}, r"comm\.timeout_seconds=nan"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_hopeless_numbers_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        small_recipe(**{"train__dtype": "float32", **changes}).validate(1)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__epsilon": 1e-30},
        {"optim__epsilon": 1e-50, "train__dtype": "float64"},
        {"optim__lr": 0.0},
        {"optim__clip_norm": 0.0},
        {"optim__weight_decay": 0.0},
        {"optim__betas": [0.0, 0.0]},
    ],
)
def test_numbers_at_the_edge_are_taken(changes: dict[str, Any]) -> None:
    small_recipe(**{"train__dtype": "float32", **changes}).validate(1)
