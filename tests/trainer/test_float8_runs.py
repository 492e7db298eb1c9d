"""Runs with train.dtype=float8: they learn as those in bfloat16 do, on every layout, and resume bit by bit. The products that they
execute are those that a trace predicts."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.trainer import run as whole_run
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.operators import float8
from bagualu.trainer.operators.registry import FLOAT8
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.operators import FLOAT8 as TRACED
from bagualu.trainer.simulation.trace import Traced, trace
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import small_recipe, train, working_tensors

STEPS = 60
OF_BFLOAT16 = 0.03
"""The most by which the loss of a step may differ from that of the run in bfloat16, relative to it: STEPS updates, each off by a few
percent of a gradient in a direction that differs from step to step."""
OF_LAYOUTS = 0.02
"""The same for two layouts. Rounding differs where a layout divides what a scale is computed over."""
MOE: dict[str, Any] = {"model__moe__experts": 4, "model__moe__top_k": 2, "model__moe__ffn": 32, "model__moe__every": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data": (2, {"parallel__data": 2}),
    "tensor": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "pipeline, weight gradients put off": (2, {"parallel__pipeline": 2, "parallel__schedule": "zb_h1"}),
    "expert, recompute": (2, {"parallel__data": 2, "parallel__expert": 2, "train__recompute": "full"}),
    "zero 3": (2, {"parallel__data": 2, "parallel__zero": 3}),
}


def recipe_of(dtype: str = "float8", **changes: Any) -> Recipe:
    """A model with widths that float8 products take, on a text of sentences that it can learn."""
    sizes = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "vocab": 128, "layers": 2, "initial_std": 0.05}
    keys = {f"model__{key}": value for key, value in sizes.items()} | {"train__dtype": dtype, "train__micro_batch": 2}
    optim = {"optim__lr": 1e-2, "optim__warmup_steps": 5, "optim__clip_norm": 1.0}
    return small_recipe(**keys, **MOE, **optim, train__steps=STEPS, data__sequence_length=16, **changes)


def tokens(folder: Path) -> Path:
    """A file of ids, in which the next one mostly follows from the one before."""
    draw, found = np.random.default_rng(0), [1]
    follows = draw.permutation(128)
    for surprise, other in zip(draw.random(20000) < 0.2, draw.integers(0, 128, 20000), strict=True):
        found.append(int(other if surprise else follows[found[-1]]))
    path = folder / "ids.bin"
    np.array(found, np.uint16).tofile(path)
    return path


def text_of(recipe: Recipe, path: Path) -> Recipe:
    return replace(recipe, data=replace(recipe.data, source=str(path), format="tokens", token_dtype="uint16"))


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokens(tmp_path_factory.mktemp("ids"))


@cache
def losses(path: Path, dtype: str, linear: str, layout: str | None = None) -> np.ndarray:
    ranks, changes = LAYOUTS[layout] if layout else (1, {})
    recipe = text_of(recipe_of(dtype, operators__linear=linear, **changes), path)
    return np.array(run("simulated", ranks, train, recipe, STEPS)[0].losses)


@pytest.mark.parametrize("variant", FLOAT8)
def test_the_curve_is_that_of_bfloat16(ids: Path, variant: str) -> None:
    half, narrow = losses(ids, "bfloat16", "torch"), losses(ids, "float8", variant)
    assert half[-1] < 0.8 * half[0], "there is something to learn"
    assert not np.array_equal(half, narrow)
    assert np.abs(narrow / half - 1).max() < OF_BFLOAT16


@pytest.mark.parametrize("variant", FLOAT8)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_curve_is_nearly_the_same_on_any_layout(ids: Path, variant: str, layout: str) -> None:
    one, other = losses(ids, "float8", variant), losses(ids, "float8", variant, layout)
    assert np.abs(other / one - 1).max() < OF_LAYOUTS
