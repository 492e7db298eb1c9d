"""A run changes engine, ZeRO stage and number of ranks at any checkpoint: every ordered pair of engines, at 2, 4 and 1 ranks."""

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
PAIRS = [pair for pair in product(KINDS, repeat=2) if pair[0] != pair[1]]
FEW = [(kind, KINDS[(index + 3) % len(KINDS)]) for index, kind in enumerate(KINDS)]
"""Pairs in which each engine and stage is once the first and once the second."""
MODEL: dict[str, Any] = {
    "model__layers": 2, "model__tie_embeddings": True, "train__dtype": "float32", "train__micro_batch": 2, "train__steps": 3,
    "parallel__bucket_bytes": ParallelConfig.bucket_bytes,
}  # fmt: skip
RELATIVE = 2e-5
"""How far float32 may be from one process after three steps."""
Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]


def on(kind: Kind, ranks: int, folder: Path) -> Recipe:
    engine, stage = kind
    return small_recipe(**MODEL, parallel__engine=engine, parallel__zero=stage, parallel__data=ranks, run__dir=str(folder))


def go_on(communicator: Communicator, recipe: Recipe, step: int) -> tuple[Pieces, float, Pieces]:
    """Loads the checkpoint after `step` steps, if there is one, trains a step and saves. Returns the state after loading, the loss,
    and the state after the step."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    if step:
        path = latest(checkpoints_of(state))
        assert path is not None
        assert load_state(state, path) == step
    loaded, loss = pieces_of(state), train_step(state, step).loss
    save_state(state, step + 1)
    after = pieces_of(state)
    state.engine.close()
    return loaded, loss, after


def straight(communicator: Communicator, recipe: Recipe) -> list[float]:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    return [train_step(state, step).loss for step in range(3)]


@pytest.mark.parametrize(
    ("first", "second"),
    [pytest.param(*pair, marks=[] if pair in FEW else [pytest.mark.slow]) for pair in PAIRS],
    ids=["-".join(f"{engine}{stage}" for engine, stage in pair) for pair in PAIRS],
)
def test_a_run_goes_from_one_engine_to_another_and_back(tmp_path: Path, first: Kind, second: Kind) -> None:
    """Weights and moments are the same to the bit after each change, and the curve is that of one process."""
    losses, saved = [], None
    for step, (kind, ranks) in enumerate([(first, 2), (second, 4), (first, 1)]):
        results = run("gloo", ranks, go_on, on(kind, ranks, tmp_path), step)
        if saved is not None:
            loaded = gather([pieces for pieces, *_ in results])
            assert loaded.keys() == saved.keys()
            assert [name for name, values in saved.items() if values.tobytes() != loaded[name].tobytes()] == []
        losses.append(results[0][1])
        saved = gather([pieces for *_, pieces in results])
    (expected,) = run("simulated", 1, straight, on(("native", 1), 1, tmp_path / "straight"))
    np.testing.assert_allclose(losses, expected, rtol=RELATIVE)
