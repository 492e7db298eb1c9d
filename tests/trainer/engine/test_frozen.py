"""Frozen parameters keep their bits and have no optimizer state, and the rest trains as if they were constants: under every engine,
stage and schedule. tests/trainer/optim/test_sharded.py has the axes."""

import functools
from typing import Any

import numpy as np
import pytest

from bagualu.parallel.config import ENGINES, ParallelConfig
from bagualu.parallel.pipeline.registry import SCHEDULES, splits_backward
from tests.harness import run
from tests.parity import gather
from tests.trainer.optim.test_sharded import FROZEN, MOE, alone, plain, trained_from

SLOW = pytest.mark.slow
CONSTANTS = list(FROZEN.values())
RELATIVE = {"float64": 1e-9, "float32": 2e-5}
Layout = dict[str, Any]


def model(which: int) -> dict[str, Any]:
    return {**MOE, "model__layers": 4, "optim__groups": CONSTANTS[which]}


@functools.cache
def expected(which: int, dtype: str) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    return plain(alone(dtype, model(which)))


def assert_frozen(backend: str, layout: Layout, which: int, dtype: str = "float64") -> None:
    """`which`: what is frozen, an index of CONSTANTS."""
    micro_batch = 1 if "schedule" in layout else 2
    parallel = {f"parallel__{key}": value for key, value in layout.items()}
    recipe = alone(dtype, {**model(which), **parallel, "train__micro_batch": micro_batch})
    recipe.validate(recipe.world_size())
    ranks = run(backend, recipe.world_size(), trained_from, recipe)
    before, after = (gather([rank[part] for rank in ranks]) for part in (0, 1))
    losses, norms, state = expected(which, dtype)
    for own_losses, own_norms in (rank[2] for rank in ranks):
        np.testing.assert_allclose(own_losses, losses, rtol=RELATIVE[dtype])
        np.testing.assert_allclose(own_norms, norms, rtol=RELATIVE[dtype])
    assert after.keys() == state.keys(), "no optimizer state of frozen parameters, and that of all others"
    for name, values in after.items():
        kind, _, parameter = name.partition("/")
        if recipe.optim.freezes(parameter):
            assert values.tobytes() == before[name].tobytes(), name
        elif kind == "weight":
            assert np.linalg.norm(values - state[name]) <= RELATIVE[dtype] * np.linalg.norm(state[name]), name


SCHEDULED = [(schedule, stage) for schedule in SCHEDULES for stage in sorted(ENGINES["native"])]
FEW = {(schedule, index % 4) for index, schedule in enumerate(SCHEDULES)}
"""Every schedule with one of the stages."""


@pytest.mark.parametrize(
    ("schedule", "stage"), [pytest.param(*case, marks=[] if case in FEW else [SLOW]) for case in SCHEDULED], ids=str
)
def test_frozen_parameters_stay_under_every_schedule_and_stage(schedule: str, stage: int) -> None:
    which = (SCHEDULES.index(schedule) + 2 * stage + stage // 2) % len(CONSTANTS)
    assert_frozen("simulated", {"pipeline": 2, "data": 2, "schedule": schedule, "zero": stage}, which)


@pytest.mark.slow
@pytest.mark.parametrize("which", range(len(CONSTANTS)), ids=list(FROZEN))
@pytest.mark.parametrize("stage", sorted(ENGINES["native"]))
def test_frozen_parameters_stay_whatever_they_are_under_all_axes_and_stages(stage: int, which: int) -> None:
    assert_frozen("simulated", {"data": 2, "expert": 2, "tensor": 2, "sequence": True, "zero": stage}, which)


FSDP = {"engine": "fsdp", "bucket_bytes": ParallelConfig.bucket_bytes}
DEEPSPEED = {"engine": "deepspeed", "data": 2}
ABLE = [schedule for schedule in SCHEDULES if not splits_backward(schedule)]
PROCESSES: list[tuple[Layout, int]] = [
    ({**FSDP, "data": 2, "pipeline": 2, "schedule": "gpipe"}, 3),
    ({**FSDP, "data": 4, "expert": 2, "shard": 2}, 4),
    ({**DEEPSPEED, "zero": 1, "pipeline": 2, "schedule": "interleaved_1f1b"}, 2),
    ({**DEEPSPEED, "zero": 2, "expert": 2}, 4),
    ({**DEEPSPEED, "zero": 3}, 1),
]
MORE_PROCESSES: list[tuple[Layout, int]] = [
    *(({**FSDP, "data": 2, "pipeline": 2, "schedule": name}, which) for name in ABLE for which in (0, 5)),
    *(({**DEEPSPEED, "zero": 1, "pipeline": 2, "schedule": name}, which) for name in ABLE for which in (0, 4)),
    ({**FSDP, "data": 2, "tensor": 2, "sequence": True}, 5),
    ({**FSDP, "data": 2, "expert": 2, "tensor": 2, "pipeline": 2}, 2),
    ({**DEEPSPEED, "zero": 2, "tensor": 2, "sequence": True}, 5),
    ({**DEEPSPEED, "zero": 3, "tensor": 2}, 4),
]


@pytest.mark.parametrize(("layout", "which"), [*PROCESSES, *(pytest.param(*case, marks=SLOW) for case in MORE_PROCESSES)], ids=str)
def test_frozen_parameters_stay_with_fsdp_and_deepspeed(layout: Layout, which: int) -> None:
    assert_frozen("gloo", layout, which, "float32" if layout["engine"] == "deepspeed" else "float64")
