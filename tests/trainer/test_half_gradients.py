"""The gradient of a step in bfloat16 is the exact one, rounded, by whatever kernels, and when weight gradients are put off."""

from dataclasses import replace

import pytest
import torch

from bagualu.comm.group import Communicator
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.operators import linear
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.harness import ON_GPU, run
from tests.parity import small_recipe

MOE = {
    "model__moe__experts": 4, "model__moe__ffn": 24, "model__moe__every": 2, "model__moe__shared_experts": 1, "model__hidden": 64,
    "model__kv_heads": 2, "model__tie_embeddings": True,
}  # fmt: skip
"""Heads of 16, and rows of whole multiples of 16 bytes: what fused kernels take."""
LARGEST_ERROR = 0.04
"""Of a parameter's gradient, relative, in the Euclidean norm: activations are rounded some forty times on the way."""


def gradients(communicator: Communicator, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Returns the gradients of the first step by the name of the parameter, in float64 on the CPU. The weights are rounded to
    bfloat16 before, so that they are the same numbers in every dtype."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    for bucket in state.engine.buckets:
        bucket.weights.copy_(bucket.weights.bfloat16())
    state.engine.optimizer.step = lambda lr, factor, updated: None  # type: ignore[method-assign]
    assert train_step(state, 0).committed
    return {
        entry.name: bucket.gradients[entry.start : entry.start + entry.parameter.numel()].double().cpu()
        for bucket in state.engine.buckets
        for entry in bucket.entries
    }


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
@pytest.mark.parametrize("backend", ["simulated", "in one kernel", ON_GPU])
def test_every_gradient_is_the_exact_one_rounded(monkeypatch: pytest.MonkeyPatch, backend: str, schedule: str) -> None:
    recipe = small_recipe(**MOE, parallel__schedule=schedule)
    (exact,) = run("simulated", 1, gradients, recipe)
    if backend == "in one kernel":  # as on a GPU; torch has a form of it for the CPU
        monkeypatch.setattr(linear, "_in_one_kernel", lambda products, x, *weights: x.dtype == torch.bfloat16 and x.shape[0] > 0)
        backend = "simulated"
    half = replace(recipe, train=replace(recipe.train, dtype="bfloat16"))
    (found,) = run(backend, 1, gradients, half)
    assert found.keys() == exact.keys()
    errors = {name: ((found[name] - value).norm() / value.norm()).item() for name, value in exact.items()}
    assert max(errors.values()) < LARGEST_ERROR, errors
    assert min(errors.values()) > 0
