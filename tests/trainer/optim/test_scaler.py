"""Loss scaling: its dynamics, and a float16 run whose first steps overflow."""

import numpy as np
import pytest
import torch

from bagualu.comm.group import Communicator
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.optim.scaler import LossScaler
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import StepResult, train_step
from tests.harness import BACKENDS, ON_GPU, run
from tests.parity import gather, pieces_of, small_recipe


def test_only_float16_is_scaled() -> None:
    for dtype in ("float64", "float32", "bfloat16"):
        scaler = LossScaler.for_dtype(dtype)
        for finite in (True, False) * 3:
            scaler.update(finite)
        assert (scaler.enabled, scaler.scale) == (False, 1.0)
    assert LossScaler.for_dtype("float16") == LossScaler(True, 2.0**16)


def test_grows_after_an_interval_of_good_steps_and_halves_at_each_bad_one() -> None:
    scaler = LossScaler(True, 8.0, growth_interval=3)
    scales = []
    for finite in (True, True, True, True, False, True, True, True, False, False):
        scaler.update(finite)
        scales.append(scaler.scale)
    assert scales == [8, 8, 16, 16, 8, 8, 8, 16, 8, 4]


def test_never_falls_below_one() -> None:
    scaler = LossScaler(True, 2.0)
    for _ in range(5):
        scaler.update(False)
    assert scaler.scale == 1.0


def everything(state: TrainerState) -> list[torch.Tensor]:
    """Every tensor that an update would change, on this rank."""
    own = [p.detach().clone() for p in state.engine.model.parameters()]
    for shard in state.engine.optimizer.shards():
        own += [value.clone() for value in shard.values()]
    return own


def overflowing(communicator: Communicator, recipe: Recipe, scale: float, steps: int) -> list[tuple[StepResult, bool, float, int]]:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    state.scaler.scale = scale
    rows = []
    for step in range(steps):
        before = everything(state)
        result = train_step(state, step)
        same = all(torch.equal(a, b) for a, b in zip(before, everything(state), strict=True))
        rows.append((result, same, state.scaler.scale, state.updates))
    return rows


LAYOUTS = [{}, {"data": 2}, {"data": 2, "zero": 0, "pipeline": 2}, {"tensor": 2, "data": 2}]


@pytest.mark.parametrize("backend", [*BACKENDS, ON_GPU])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_that_overflows_is_discarded_on_all_ranks_and_the_next_ones_recover(backend: str, layout: dict[str, int]) -> None:
    small = {"model__layers": 2, "train__micro_batch": 2}
    recipe = small_recipe(train__dtype="float16", train__steps=40, **small, **{f"parallel__{k}": v for k, v in layout.items()})
    ranks = run(backend, recipe.world_size(), overflowing, recipe, 2.0**22, 10)
    committed = [result.committed for result, *_ in ranks[0]]
    assert not any(committed[:2]), "the scale was meant to overflow"
    assert committed.count(True) >= 6, "the scale has come down to where gradients are finite"
    for rank in ranks:
        assert [result.committed for result, *_ in rank] == committed
        for step, (result, unchanged, scale, updates) in enumerate(rank):
            assert unchanged == (not result.committed)
            assert scale == 2.0 ** (22 - committed[: step + 1].count(False))
            assert updates == committed[: step + 1].count(True)
            assert np.isfinite(result.loss)  # the loss itself is not scaled


def float16_curve(communicator: Communicator, recipe: Recipe) -> tuple[list[float], list[float], list[object]]:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    state.scaler.scale = 1024.0 if recipe.train.dtype == "float16" else 1.0
    results = [train_step(state, step) for step in range(4)]
    return [r.loss for r in results], [r.grad_norm for r in results], pieces_of(state)


def test_the_scale_leaves_no_trace() -> None:
    """Loss, reported norm and update are those of the unscaled gradient, within float16's rounding."""
    dtypes = ("float16", "float64")
    half, whole = (small_recipe(train__dtype=d, train__steps=8, parallel__data=2, optim__epsilon=1e-5) for d in dtypes)
    found, expected = run("simulated", 2, float16_curve, half), run("simulated", 2, float16_curve, whole)
    np.testing.assert_allclose(found[0][0], expected[0][0], rtol=2e-3)
    np.testing.assert_allclose(found[0][1], expected[0][1], rtol=5e-3)
    values, references = gather([r[2] for r in found]), gather([r[2] for r in expected])
    for name, reference in references.items():
        assert values[name].dtype == np.float32
        np.testing.assert_allclose(values[name], reference, rtol=0, atol=0.02 * np.abs(reference).max(), err_msg=name)
