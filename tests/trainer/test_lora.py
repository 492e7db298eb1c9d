"""Invariant 1 with low-rank factors: they train the same curve in every layout and with every engine, and what lies beside them
keeps its bits. tests/trainer/models/decoder/test_lora.py holds that the curve of one process is right."""

import functools
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from bagualu.comm.group import Communicator
from bagualu.parallel.boxes import Box
from bagualu.parallel.config import ParallelConfig
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.decoder.initialise import normal_values, seeded_values
from bagualu.trainer.models.decoder.lora import FIRST, SECOND
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.covering import covering
from tests.harness import run
from tests.parity import gather, pieces_of, small_recipe
from tests.trainer.models.styles import STYLES

SLOW = pytest.mark.slow
STEPS, BATCH = 3, 8
MOE = {"moe__experts": 4, "moe__ffn": 8, "moe__every": 2, "moe__shared_experts": 1}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": MOE,
    "tied": {"tie_embeddings": True, "layers": 5, "kv_heads": 2},
    **{style: {**STYLES[style], **MOE} for style in ("gpt", "qwen3", "olmo3")},
    "few": {**MOE, "lora__targets": ["value", "layers.2.*.up.weight"]},
    "last": {"lora__targets": ["layers.3.*"]},
    "experts": {**MOE, "lora__targets": ["*.experts.*"], "lora__rank": 2},
}
RELATIVE = {"float64": 1e-9, "float32": 2e-5}
Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]
Figures = list[tuple[float, float, float]]
"""Loss, balance loss and gradient norm of each step."""


def recipe_for(model: str, layout: dict[str, Any], **changes: Any) -> Recipe:
    lora = {"model__lora__rank": 3, "model__lora__alpha": 4.5}
    named = {f"model__{key}": value for key, value in MODELS[model].items()}
    parallel = {f"parallel__{key}": value for key, value in layout.items()}
    return small_recipe(**{**lora, **named, **parallel, "optim__epsilon": 1e-5, **changes})


def trained(communicator: Communicator, recipe: Recipe) -> tuple[Pieces, Figures, Pieces]:
    """The state before and after, and the figures of the steps. Second factors do not begin at zero, where first ones have no
    gradient."""
    drawn = seeded_values(recipe.model, recipe.run.seed)

    def fill(name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        return normal_values(1, name, shape, box, 0.2) if name.endswith(SECOND) else drawn(name, shape, box)

    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab), fill)
    before, results = pieces_of(state), [train_step(state, step) for step in range(STEPS)]
    assert all(result.committed for result in results)
    after = pieces_of(state)
    state.engine.close()
    return before, [(result.loss, result.balance_loss, result.grad_norm) for result in results], after


@functools.cache
def alone(model: str, dtype: str, optimizer: str) -> tuple[dict[str, np.ndarray], Figures, dict[str, np.ndarray]]:
    recipe = recipe_for(model, {}, train__micro_batch=BATCH, train__dtype=dtype, optim__name=optimizer)
    ((before, figures, after),) = run("simulated", 1, trained, recipe)
    return gather([before]), figures, gather([after])


def assert_same(model: str, layout: dict[str, Any], backend: str = "simulated", **changes: Any) -> None:
    in_replica = BATCH // layout.get("data", 1)
    sequences = 2 if in_replica >= 2 * layout.get("pipeline", 1) else 1
    recipe = recipe_for(model, layout, **{"train__micro_batch": sequences, **changes})
    recipe.validate(recipe.world_size())
    dtype = recipe.train.dtype
    began, expected, ended = alone(model, dtype, recipe.optim.name)
    ranks = run(backend, recipe.world_size(), trained, recipe)
    before, after = (gather([rank[part] for rank in ranks]) for part in (0, 2))
    assert [name for name, values in began.items() if values.tobytes() != before[name].tobytes()] == []
    for _, figures, _ in ranks:
        np.testing.assert_allclose(figures, expected, rtol=RELATIVE[dtype], atol=1e-15)
    assert after.keys() == ended.keys()
    for name, values in ended.items():
        kind, _, parameter = name.partition("/")
        if not name.endswith((FIRST, SECOND)):
            assert kind == "weight", "no optimizer state of what is not trained"
            assert after[name].tobytes() == before[name].tobytes(), name
        elif dtype == "float64":
            scale = np.abs(values).max()
            assert scale > 0, name
            np.testing.assert_allclose(after[name], values, rtol=1e-9, atol=1e-9 * scale, err_msg=name)
        elif kind == "weight":
            assert np.linalg.norm(after[name] - values) <= RELATIVE[dtype] * np.linalg.norm(values), parameter


AXES: dict[str, list[Any]] = {
    "tensor": [{}, {"tensor": 2}, {"tensor": 2, "sequence": True}],
    "data": [{"zero": 0}, {"zero": 1}, {"zero": 2}, {"zero": 3}],
    "pipeline": [{}, *({"pipeline": 2, "schedule": name} for name in ("1f1b", "zb_h1", "zb_v", "interleaved_1f1b"))],
    "expert": [{}, {"expert": 2}],
    "recompute": ["none", "full", "attention"],
    "model": ["moe", "gpt", "qwen3", "olmo3", "few"],
}


EVERY = list(product(*AXES.values()))
COVERING = [EVERY[index] for index in covering([dict(zip(AXES, map(str, case), strict=True)) for case in EVERY])]


@pytest.mark.parametrize("case", COVERING, ids=lambda case: "-".join(str(part).replace(" ", "") for part in case))
def test_every_pair_of_choices_trains_the_same_curve(case: tuple[Any, ...]) -> None:
    tensor, data, pipeline, expert, recompute, model = case
    bucket = 512 if len(pipeline) else 4096
    layout = {"data": 2, "bucket_bytes": bucket, **tensor, **data, **pipeline, **expert}
    assert_same(model, layout, train__recompute=recompute)


MORE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dense", {"data": 8}, {}),
    ("dense", {"tensor": 4}, {"train__offload_bytes": 4000}),
    ("tied", {"data": 2, "pipeline": 2, "schedule": "dualpipe_v"}, {}),
    ("tied", {"tensor": 2, "pipeline": 4, "sequence": True}, {}),
    ("experts", {"data": 4, "expert": 4, "zero": 3}, {}),
    ("experts", {"data": 2, "expert": 2, "tensor": 2, "zero": 2}, {"train__recompute": "experts"}),
    ("last", {"pipeline": 4, "data": 2}, {}),
    ("last", {"data": 2, "zero": 3}, {"train__offload_bytes": 2**30}),
    ("dense", {"data": 2, "tensor": 2}, {"optim__name": "muon"}),
    ("moe", {"data": 2, "expert": 2, "pipeline": 2, "zero": 2}, {"optim__name": "muon"}),
]


@pytest.mark.parametrize(("model", "layout", "changes"), MORE, ids=str)
def test_layouts_targets_and_optimizers_beyond_the_covering_train_the_same_curve(
    model: str, layout: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert_same(model, layout, **changes)


FSDP = {"engine": "fsdp", "bucket_bytes": ParallelConfig.bucket_bytes}
DEEPSPEED = {"engine": "deepspeed", "data": 2}
PROCESSES: list[tuple[str, dict[str, Any]]] = [
    ("moe", {**FSDP, "data": 2, "expert": 2, "tensor": 2}),
    ("moe", {**DEEPSPEED, "zero": 1, "pipeline": 2, "schedule": "interleaved_1f1b"}),
    ("dense", {**DEEPSPEED, "zero": 3, "tensor": 2}),
]
MORE_PROCESSES: list[tuple[str, dict[str, Any]]] = [
    ("moe", {**DEEPSPEED, "zero": 2, "expert": 2, "tensor": 2, "sequence": True}),
    ("moe", {**FSDP, "data": 4, "expert": 2, "shard": 2}),
    ("tied", {**FSDP, "data": 2, "pipeline": 2, "schedule": "gpipe"}),
    ("last", {**FSDP, "data": 2, "pipeline": 2}),
    ("last", {**DEEPSPEED, "zero": 1, "pipeline": 2}),
    ("few", {**DEEPSPEED, "zero": 3}),
    ("few", {**FSDP, "data": 4}),
    ("moe", {"data": 2, "tensor": 2, "expert": 2, "zero": 3}),
]


@pytest.mark.parametrize(("model", "layout"), [*PROCESSES, *(pytest.param(*case, marks=SLOW) for case in MORE_PROCESSES)], ids=str)
def test_every_engine_trains_the_same_curve(model: str, layout: dict[str, Any]) -> None:
    dtype = "float32" if layout.get("engine") == "deepspeed" else "float64"
    assert_same(model, layout, "gloo", train__dtype=dtype)


@SLOW
def test_generated_kernels_train_the_same_curve() -> None:
    assert_same("dense", {"data": 2}, "gloo", train__compile=True)
