"""A run changes engine, ZeRO stage and number of ranks at any checkpoint: every ordered pair of engines, at 2, 4 and 1 ranks."""

import functools
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.parallel.config import ENGINES, ParallelConfig
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recovery.state import checkpoints_of
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import gather, pieces_of, small_recipe
from tests.trainer.states import load_state, save_state

Kind = tuple[str, int]
"""An engine and its ZeRO stage."""
KINDS: list[Kind] = [(engine, stage) for engine, stages in ENGINES.items() for stage in sorted(stages)]
PAIRS = list(product(KINDS, repeat=2))
FEW = [(kind, KINDS[(index + 3) % len(KINDS)]) for index, kind in enumerate(KINDS)] + [(("deepspeed", 3), ("deepspeed", 3))]
"""Pairs in which each engine and stage is once the first and once the second; and an engine that divides parts of other sizes."""
MODEL: dict[str, Any] = {
    "model__layers": 2, "model__tie_embeddings": True, "train__micro_batch": 2, "train__steps": 5,
    "parallel__bucket_bytes": ParallelConfig.bucket_bytes,
}  # fmt: skip
STEPS = 5
RELATIVE = {"float64": 1e-9, "float32": 2e-5}
"""How far a run may be from one process after `STEPS` steps: losses and gradient norms; weights by the norm of a tensor's
difference."""
Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]
Figures = list[tuple[float, float]]
"""The loss and the gradient norm of each step."""


def on(kind: Kind, dtype: str, ranks: int, folder: Path | str = "unused", rank: int | None = None) -> Recipe:
    """`rank`: of low-rank factors; None: there are none."""
    engine, stage = kind
    layout = {"parallel__engine": engine, "parallel__zero": stage, "parallel__data": ranks}
    return small_recipe(**MODEL, **layout, train__dtype=dtype, run__dir=str(folder), model__lora__rank=rank)


def go_on(communicator: Communicator, recipe: Recipe, first: int, last: int) -> tuple[Pieces, Figures, Pieces]:
    """Loads the checkpoint after `first` steps, if there is one, trains to the end of step `last` and saves. Returns the state
    after loading, the figures of the steps, and the state after them."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    if first:
        path = latest(checkpoints_of(state))
        assert path is not None
        assert load_state(state, path) == first
    loaded, results = pieces_of(state), [train_step(state, step) for step in range(first, last)]
    save_state(state, last)
    after = pieces_of(state)
    state.engine.close()
    return loaded, [(result.loss, result.grad_norm) for result in results], after


def straight(communicator: Communicator, recipe: Recipe) -> tuple[Figures, Pieces]:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    results = [train_step(state, step) for step in range(STEPS)]
    return [(result.loss, result.grad_norm) for result in results], pieces_of(state)


@functools.cache
def alone(dtype: str, rank: int | None) -> tuple[Figures, dict[str, np.ndarray]]:
    ((figures, pieces),) = run("simulated", 1, straight, on(("native", 1), dtype, 1, rank=rank))
    return figures, gather([pieces])


@pytest.mark.parametrize(
    ("first", "second"),
    [pytest.param(*pair, marks=[] if pair in FEW else [pytest.mark.slow]) for pair in PAIRS],
    ids=["-".join(f"{engine}{stage}" for engine, stage in pair) for pair in PAIRS],
)
def test_a_run_goes_from_one_engine_to_another_and_back(tmp_path: Path, first: Kind, second: Kind) -> None:
    assert_changes(tmp_path, first, second, None)


WITH_FACTORS: list[tuple[Kind, Kind]] = [
    (("native", 3), ("fsdp", 3)), (("fsdp", 3), ("native", 0)), (("deepspeed", 1), ("native", 2)), (("deepspeed", 3), ("fsdp", 3)),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), WITH_FACTORS, ids=str)
def test_a_run_that_trains_factors_goes_from_one_engine_to_another_and_back(tmp_path: Path, first: Kind, second: Kind) -> None:
    assert_changes(tmp_path, first, second, 3)


def assert_changes(folder: Path, first: Kind, second: Kind, rank: int | None) -> None:
    """Weights and moments are the same to the bit after each change, and the curve is that of one process."""
    dtype = "float32" if "deepspeed" in (first[0], second[0]) else "float64"
    figures: Figures = []
    saved: dict[str, np.ndarray] = {}
    for (begin, end), (kind, ranks) in zip([(0, 2), (2, 4), (4, STEPS)], [(first, 2), (second, 4), (first, 1)], strict=True):
        results = run("gloo", ranks, go_on, on(kind, dtype, ranks, folder, rank), begin, end)
        if begin:
            loaded = gather([pieces for pieces, *_ in results])
            assert loaded.keys() == saved.keys()
            assert [name for name, values in saved.items() if values.tobytes() != loaded[name].tobytes()] == []
        figures += results[0][1]
        saved = gather([pieces for *_, pieces in results])
    expected, weights = alone(dtype, rank)
    np.testing.assert_allclose(figures, expected, rtol=RELATIVE[dtype])
    assert saved.keys() == weights.keys()
    for name, values in weights.items():
        if name.startswith("weight/"):
            difference = np.linalg.norm(saved[name] - values) / np.linalg.norm(values)
            assert difference <= RELATIVE[dtype], f"{name}: {difference}"
