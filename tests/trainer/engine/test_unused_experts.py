"""An expert that gets tokens in some steps only: in the others its gradient is zero, under every stage of the native engine."""

from typing import Any

import numpy as np
import pytest

from bagualu.comm.group import Communicator
from bagualu.parallel.config import ENGINES
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import Curve, gather, pieces_of, small_recipe

EXPERTS, IDLE, BUSY_STEPS, STEPS = 4, 3, (1, 4), 5
MODEL = {"moe__experts": EXPERTS, "moe__ffn": 8, "moe__every": 2, "moe__top_k": 1, "moe__bias_rate": 1e-6}
LAYOUTS: list[dict[str, object]] = [{"data": 2, "expert": 2}, {"data": 4, "expert": 2}]


def trained(communicator: Communicator, recipe: Recipe) -> tuple[Curve, list[float]]:
    """The curve, and how many tokens the idle expert of the first mixture got in each step."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    initial, results, tokens = pieces_of(state), [], []
    for step in range(STEPS):
        for name, bias in state.engine.model.named_buffers():
            assert name.endswith("router.bias")
            bias.zero_()
            bias[IDLE] = 10.0 if step + 1 in BUSY_STEPS else -10.0
        results.append(train_step(state, step))
        assert results[-1].committed
        loads = getattr(state.engine.model, "_loads")  # noqa: B009
        tokens.append(float(sum(load[IDLE] for load in loads.values())))
    return Curve([r.loss for r in results], [], [r.grad_norm for r in results], pieces_of(state), initial), tokens


def recipe_for(**layout: object) -> Recipe:
    model: dict[str, Any] = {f"model__{key}": value for key, value in MODEL.items()}
    parallel: dict[str, Any] = {f"parallel__{key}": value for key, value in layout.items()}
    return small_recipe(**model, **parallel, train__micro_batch=2, optim__weight_decay=0.1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["expert", "data and expert"])
@pytest.mark.parametrize("stage", ENGINES["native"])
def test_an_expert_without_tokens_gets_a_zero_gradient(stage: int, layout: dict[str, object]) -> None:
    ((alone, tokens),) = run("simulated", 1, trained, recipe_for())
    assert [step for step, count in enumerate(tokens, 1) if count] == list(BUSY_STEPS)
    recipe = recipe_for(zero=stage, **layout)
    curves = [curve for curve, _ in run("simulated", recipe.world_size(), trained, recipe)]
    for curve in curves:
        np.testing.assert_allclose(curve.losses, alone.losses, rtol=1e-9)
        np.testing.assert_allclose(curve.norms, alone.norms, rtol=1e-9)
    ours, expected = gather([curve.pieces for curve in curves]), gather([alone.pieces])
    for name, values in expected.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-9, atol=1e-9 * np.abs(values).max(), err_msg=name)
