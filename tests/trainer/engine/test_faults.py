"""Faults in the memory of a rank with DeepSpeed, and with every engine those that a recipe plans: afterwards every bit is that of
the run without them. tests/trainer/test_guard.py has the native engine, test_fsdp.py FSDP2."""

from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.group import Communicator
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.observers import plan_faults
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import gather, pieces_of, small_recipe
from tests.trainer import test_guard
from tests.trainer.engine.test_changes import KINDS, Kind
from tests.trainer.faults import Fault, assert_same_bits, gradient, reduced
from tests.trainer.test_guard import BAD, STEPS

SLOW = pytest.mark.slow
FAULTS = {
    "nan": (gradient("nan"), False), "gradient": (gradient(), False), "copy": (Fault("copy"), False),
    "state": (Fault("exp_avg"), True), "reduced": (reduced(), False),
}  # fmt: skip
"""A fault, and whether the run goes back to a checkpoint, because no other rank holds what was damaged."""
FEW = {(1, "copy"), (2, "gradient"), (3, "state")}
UNDER_DEEPSPEED = [(stage, name) for stage in (1, 2, 3) for name in FAULTS if (stage, name) != (3, "reduced")]
"""In ZeRO-3 DeepSpeed hands out a copy of a reduced gradient."""


@pytest.mark.parametrize(
    ("stage", "name"), [pytest.param(*case, marks=[] if case in FEW else [SLOW]) for case in UNDER_DEEPSPEED], ids=str
)
def test_after_a_fault_under_deepspeed_the_run_is_the_one_without_it(tmp_path: Path, stage: int, name: str) -> None:
    fault, back = FAULTS[name]
    changes: dict[str, Any] = {
        "parallel__engine": "deepspeed", "parallel__zero": stage, "train__dtype": "bfloat16" if name == "copy" else "float32",
    }  # fmt: skip
    recipe = test_guard.recipe_in(tmp_path, "data", checkpoint__every=3, checkpoint__keep=4, **changes)
    found = test_guard.runs("gloo", recipe, fault)
    assert found[0].error == ""
    assert_same_bits(found, test_guard.straight("gloo", "data", STEPS, **changes))
    assert found[0].guard["rolled_back"] == back
    assert [line["step"] for line in found[0].lines] == list(range(1, STEPS + 1))
    if not back:
        assert found[0].line(BAD)["ranks"] == [fault.rank]
        assert found[0].line(BAD)["attempts"] > 1


Pieces = list[Any]


def under_faults(communicator: Communicator, recipe: Recipe) -> tuple[Pieces, list[tuple[int, ...]]]:
    """The state after three steps, and the ranks that the guard found at fault in each step."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    plan_faults(state, communicator, None)
    results = [train_step(state, step) for step in range(3)]
    assert all(result.committed for result in results)
    after = pieces_of(state)
    state.engine.close()
    return after, [result.verdict.ranks for result in results]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in (("native", 3), ("deepspeed", 2), ("deepspeed", 3)) else [SLOW]) for kind in KINDS],
    ids=lambda kind: f"{kind[0]}{kind[1]}",
)
def test_planned_faults_strike_a_rank_s_gradients_and_leave_no_trace(tmp_path: Path, kind: Kind) -> None:
    engine, stage = kind
    recipe = small_recipe(
        run__dir=str(tmp_path), train__dtype="float32", train__micro_batch=2, model__layers=2, guard__audit_every=1,
        parallel__engine=engine, parallel__zero=stage, parallel__data=2, parallel__bucket_bytes=Recipe().parallel.bucket_bytes,
    )  # fmt: skip
    straight = run("gloo", 2, under_faults, recipe)
    recipe.faults = ["nan@step=2:rank=1", "flip@step=3:rank=0:what=gradient"]
    found = run("gloo", 2, under_faults, recipe)
    assert [ranks for _, ranks in found] == [[(), (1,), (0,)]] * 2
    ours, expected = gather([pieces for pieces, _ in found]), gather([pieces for pieces, _ in straight])
    assert ours.keys() == expected.keys()
    assert [name for name, values in expected.items() if values.tobytes() != ours[name].tobytes()] == []
