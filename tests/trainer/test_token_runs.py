"""Whole runs on token files: resuming, blends whose weights change under changing ranks, and documents in a row in any layout."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.parallel.config import ParallelConfig
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.evaluate import validate
from bagualu.trainer.generation.score import text_loss
from bagualu.trainer.generation.stages import Stages
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.preflight import check_run_directory
from bagualu.trainer.simulation.trace import traceable
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import Curve, assert_same, train
from tests.standing import samples, train_noting_samples
from tests.trainer.data.token_files import write_megatron
from tests.trainer.test_run import recipe_in

S = 8


def write(folder: Path, name: str, sequences: int, seed: int) -> str:
    """Writes a file of ids below 64 with `sequences` training sequences and as many for validation."""
    path = folder / f"{name}.bin"
    np.random.default_rng(seed).integers(0, 64, 2 * (sequences * S + 1)).astype(np.uint16).tofile(path)
    return str(path)


def recipe_on(folder: Path, **changes: object) -> Recipe:
    fixed = {"data__cache": str(folder / "cache"), "data__validation_fraction": 0.5, "data__sequence_length": S}
    return recipe_in(
        folder / "run", **{**fixed, "data__source": "stdlib", "model__vocab": 64, "checkpoint__resume": True, **changes}
    )


def goes_on(communicator: Communicator, recipe: Recipe) -> dict[str, Any]:
    check_run_directory(recipe)
    return train_noting_samples(recipe, communicator, lambda: False)


def went_on(recipe: Recipe) -> dict[str, Any]:
    return run("simulated", recipe.world_size(), goes_on, recipe)[0]


def test_a_run_goes_on_with_a_moved_file_and_refuses_a_changed_one(tmp_path: Path) -> None:
    first = went_on(recipe_on(tmp_path, data__source=write(tmp_path, "a", 20, 0), train__steps=2))
    assert (first["train_tokens"], first["validation_tokens"]) == (20 * S + 1, 20 * S + 1)
    (tmp_path / "a.bin").rename(tmp_path / "b.bin")
    moved = str(tmp_path / "b.bin")
    assert went_on(recipe_on(tmp_path, data__source=moved, train__steps=4))["step"] == 4
    status = os.stat(moved)
    ids = np.fromfile(moved, np.uint16)
    ids[3] ^= 1
    ids.tofile(moved)
    os.utime(moved, ns=(status.st_mtime_ns + 1, status.st_mtime_ns + 1))
    with pytest.raises(RecipeError, match=r"with data fingerprint=\w+ but .*; put the text of data\.source=.*b\.bin back"):
        went_on(recipe_on(tmp_path, data__source=moved, train__steps=6))


def test_the_step_of_a_recipe_on_files_is_traced_without_them() -> None:
    changes = {"data__format": "llmc", "data__packing": "documents", "data__end_token": 3, "data__blend": blend(Path("none"), a=1)}
    recipe = traceable(recipe_on(Path("none"), **changes))
    recipe.data.validate()
    assert (recipe.data.source, recipe.data.sequence_length) == ("random", S)


def blend(folder: Path, **weights: float) -> list[dict[str, Any]]:
    return [{"source": str(folder / f"{name}.bin"), "weight": weight} for name, weight in weights.items()]


def used(folder: Path, names: dict[int, str], steps: range) -> list[tuple[str, int]]:
    """(source, sequence) of every sample of `steps` (from 1), by the numbers of the sources in the blend of the time."""
    return [(names[sample >> 44], sample % 2**44) for (step, _), sample in sorted(samples(folder).items()) if step in steps]


def test_weights_change_in_mid_run_and_ranks_too_and_no_sample_is_lost_or_used_twice(tmp_path: Path) -> None:
    """Four starts, each with other weights or other ranks, in all less than an epoch of each source."""
    for name in "abc":
        write(tmp_path, name, 60, seed=ord(name))
    parts: list[tuple[int, dict[str, float], dict[str, object]]] = [
        (3, {"a": 0.7, "b": 0.3}, {"parallel__data": 2}),
        (5, {"b": 0.5, "a": 0.5}, {"parallel__data": 4}),
        (8, {"b": 0.5, "a": 0.5}, {"parallel__data": 1, "parallel__pipeline": 2}),
        (12, {"c": 1, "a": 3}, {"parallel__data": 2}),
    ]
    everything, done = [], 0
    for steps, weights, layout in parts:
        recipe = recipe_on(tmp_path, data__blend=blend(tmp_path, **weights), train__steps=steps, checkpoint__every=1, **layout)
        went_on(recipe)
        everything += used(tmp_path / "run", dict(enumerate(weights)), range(done + 1, steps + 1))
        for path in (tmp_path / "run").glob("samples-*.jsonl"):
            path.unlink()
        done = steps
    counts = Counter(everything)
    assert max(counts.values()) == 1
    assert len(counts) == 12 * 4
    by_source = Counter(source for source, _ in everything)
    assert by_source == {"a": 8 + 4 + 6 + 12, "b": 4 + 4 + 6, "c": 4}
    again = recipe_on(tmp_path, data__blend=blend(tmp_path, a=1), run__dir=str(tmp_path / "alone"), train__steps=15)
    went_on(again)  # the first epoch of a alone
    order = used(tmp_path / "alone", {0: "a"}, range(1, 16))
    assert {sample for sample in everything if sample[0] == "a"} == set(order[:30])


def test_a_blend_validates_each_source_and_a_changed_source_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path, name, 60, seed=ord(name))
    went_on(recipe_on(tmp_path, data__blend=blend(tmp_path, a=1, b=2), train__steps=2))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = lines[-1]["validation_losses"]
    assert list(losses) == [str(tmp_path / "a.bin"), str(tmp_path / "b.bin")]
    assert np.mean(list(losses.values())) == pytest.approx(lines[-1]["validation_loss"])
    with pytest.raises(RecipeError, match=r"was saved with data\.blend; give its data\.blend"):
        went_on(recipe_on(tmp_path, data__source=str(tmp_path / "a.bin"), train__steps=4))
    (tmp_path / "b.bin").unlink()
    write(tmp_path, "b", 60, seed=5)
    with pytest.raises(RecipeError, match=r"was saved with other tokens of .*b\.bin in data\.blend; put them back"):
        went_on(recipe_on(tmp_path, data__blend=blend(tmp_path, a=1, b=2), train__steps=4))
    assert went_on(recipe_on(tmp_path, data__blend=blend(tmp_path, a=1), train__steps=4))["step"] == 4


def test_blends_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", 20, seed=1)
    (tmp_path / "b.bin").write_bytes((tmp_path / "a.bin").read_bytes())
    (tmp_path / "text").write_text("some words")
    for changes, message in (
        ({"data__blend": blend(tmp_path, a=1, b=1)}, "hold the same tokens; give one of them"),
        ({"data__blend": blend(tmp_path, a=1, c=1)}, "c.bin is not there"),
        (
            {"data__blend": [{"source": str(tmp_path / "text"), "weight": 1}]},
            "which is text and would get a tokenizer of its own; give data.tokenizer",
        ),
        ({"data__blend": blend(tmp_path, a=1) * 2}, "a.bin twice"),
        ({"data__blend": blend(tmp_path, a=1), "data__source": "random"}, "data.blend exclude each other"),
    ):
        recipe = recipe_on(tmp_path, **changes)
        with pytest.raises(RecipeError, match=message):
            _checked(recipe)


def _checked(recipe: Recipe) -> None:
    recipe.data.validate()
    prepare(recipe.data, 64)


LAYOUTS: list[dict[str, object]] = [
    {"data": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2, "schedule": "zb_h1"}, {"data": 2, "zero": 3},
    {"data": 2, "expert": 2},
]  # fmt: skip


def packed(folder: Path, positions: str = "rotary", **changes: object) -> Recipe:
    """A recipe on documents of 1 to 12 tokens."""
    draw = np.random.default_rng(2)
    if not (folder / "ids.idx").exists():
        write_megatron(folder / "ids", [draw.integers(0, 64, draw.integers(1, 13)).tolist() for _ in range(200)])
    model: dict[str, object] = {"model__positions": positions, "model__max_positions": 16 if positions == "learned" else None}
    model |= {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2}
    fixed = {"data__source": str(folder / "ids"), "data__packing": "documents", "data__sequence_length": 16, "train__steps": 3}
    return recipe_on(folder, **{**fixed, **model, "parallel__data": 1, "train__validation_sequences": 6, **changes})


def curve(communicator: Communicator, recipe: Recipe) -> tuple[Curve, float]:
    found = train(communicator, recipe, 3)
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    validation = validate(state)
    assert validation is not None
    return found, validation.loss


@pytest.mark.parametrize("positions", ["rotary", "learned", "alibi"])
def test_documents_train_the_same_in_every_layout(tmp_path: Path, positions: str) -> None:
    serial = run("simulated", 1, curve, packed(tmp_path, positions))
    unmasked = run("simulated", 1, curve, packed(tmp_path, positions, data__packing="stream"))
    assert unmasked[0][0].losses[0] != pytest.approx(serial[0][0].losses[0], rel=1e-6)
    for layout in LAYOUTS:
        recipe = packed(tmp_path, positions, **{f"parallel__{key}": value for key, value in layout.items()})
        ranks = run("simulated", recipe.world_size(), curve, recipe)
        assert_same([found for found, _ in ranks], [serial[0][0]])
        assert [loss for _, loss in ranks] == pytest.approx([serial[0][1]] * len(ranks), rel=1e-9)


def scored(communicator: Communicator, recipe: Recipe) -> tuple[float, float]:
    """The loss of all validation sequences as training validates and as `bagualu evaluate` computes it."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    stages = Stages(state.recipe, state.mesh, state.engine.model, state.engine.slices)
    numbers = list(range(state.batches.validation_count))
    loss = text_loss(stages, lambda number: state.batches.validation(number, 1), numbers, state.corpus.token_bytes)
    validation = validate(state)
    assert validation is not None
    return validation.loss, float(loss.as_dict()["loss"] or 0)


def test_documents_are_evaluated_as_they_are_validated(tmp_path: Path) -> None:
    for layout in ({"data": 1}, {"tensor": 2, "pipeline": 2}):
        keys = {f"parallel__{key}": value for key, value in layout.items()}
        recipe = packed(tmp_path, "learned", train__validation_sequences=10**6, **keys)
        for validated, evaluated in run("simulated", recipe.world_size(), scored, recipe):
            assert evaluated == pytest.approx(validated, rel=1e-9)


def figures(communicator: Communicator, recipe: Recipe) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of three steps."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    results = [train_step(state, step) for step in range(3)]
    state.engine.close()
    return [result.loss for result in results], [result.grad_norm for result in results]


@pytest.mark.parametrize("engine", [{"engine": "fsdp"}, {"engine": "deepspeed", "zero": 2}, {"engine": "deepspeed", "zero": 3}])
def test_documents_train_the_same_on_every_engine(tmp_path: Path, engine: dict[str, object]) -> None:
    deepspeed = engine["engine"] == "deepspeed"  # which updates weights in float32
    dtype = {"train__dtype": "float32" if deepspeed else "float64", "parallel__bucket_bytes": ParallelConfig().bucket_bytes}
    (serial,) = run("gloo", 1, figures, packed(tmp_path, "learned", **dtype))
    recipe = packed(tmp_path, "learned", parallel__data=2, **dtype, **{f"parallel__{key}": value for key, value in engine.items()})
    for found in run("gloo", 2, figures, recipe):
        np.testing.assert_allclose(found, serial, rtol=2e-5 if deepspeed else 1e-9)
