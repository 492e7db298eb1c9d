"""Padding of the vocabulary is no part of a run: whatever the tensor degree, weights begin alike and any checkpoint is read."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.checkpoint.saving.save import save
from bagualu.launch.workers.elastic_layout import fitted
from bagualu.parallel.boxes import TensorPiece
from bagualu.parallel.config import ENGINES, ParallelConfig
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.compose import save_recipe
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recovery.state import checkpoints_of, metadata_of
from bagualu.trainer.step import train_step
from tests.covering import in_turns
from tests.harness import run
from tests.parity import assert_same, gather, pieces_of, small_recipe, train
from tests.trainer.states import load_state, save_state

VOCABULARY = ("embedding.weight", "head.weight")
STEPS = 2


def recipe_in(folder: Path, vocab: int, tensor: int = 1, **changes: object) -> Recipe:
    shape = {"model__vocab": vocab, "model__layers": 2, "parallel__tensor": tensor, "model__hidden": 24, "model__heads": 12}
    return small_recipe(run__dir=str(folder), **{**shape, "model__kv_heads": 12, **changes})


def made(communicator: Communicator, recipe: Recipe) -> TrainerState:
    return assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))


def trained(communicator: Communicator, recipe: Recipe) -> list:  # type: ignore[type-arg]
    state = made(communicator, recipe)
    for step in range(STEPS):
        assert train_step(state, step).committed
    save_state(state, STEPS)
    return pieces_of(state)


def read(communicator: Communicator, recipe: Recipe) -> tuple[list, list[torch.Tensor]]:  # type: ignore[type-arg]
    """What came, and rows of padding that are not zero."""
    state = made(communicator, recipe)
    path = latest(Path(recipe.run.dir) / "checkpoints")
    assert path is not None
    assert load_state(state, path) == STEPS
    held = [(entry, entry.parameter) for bucket in state.engine.buckets for entry in bucket.entries if entry.name in VOCABULARY]
    padding = [weights[max(0, entry.global_shape[0] - entry.box.offset[0]) :] for entry, weights in held]
    return pieces_of(state), [rows for rows in padding if rows.abs().sum() > 0]


@pytest.mark.parametrize(("vocab", "before", "after"), [(97, 1, 2), (97, 2, 3), (61, 4, 1), (61, 3, 4), (5, 6, 1), (5, 1, 6)])
def test_a_checkpoint_of_any_vocabulary_is_read_by_any_tensor_degree(tmp_path: Path, vocab: int, before: int, after: int) -> None:
    saved = gather(run("simulated", before, trained, recipe_in(tmp_path, vocab, before)))
    (found,) = Path(tmp_path / "checkpoints").glob("step-*")
    shapes = {name: shape for name, (shape, _) in Checkpoint(found).tensors.items() if name.endswith(VOCABULARY)}
    assert {shape[0] for shape in shapes.values()} == {vocab}
    for changes in ({}, {"model__vocab_multiple": 16}):
        ranks = run("simulated", after, read, recipe_in(tmp_path, vocab, after, **changes))
        assert not any(rows for _, rows in ranks)
        whole = gather([pieces for pieces, _ in ranks])
        assert whole.keys() == saved.keys()
        assert all((whole[name] == saved[name]).all() for name in saved)


@pytest.mark.parametrize("changes", [{}, {"model__tie_embeddings": True, "model__vocab_multiple": 10, "parallel__data": 2}])
def test_the_curve_of_a_padded_model_is_that_of_the_model_without_padding(tmp_path: Path, changes: dict[str, object]) -> None:
    tied = {key: value for key, value in changes.items() if key == "model__tie_embeddings"}
    plain = run("simulated", 1, train, recipe_in(tmp_path, 61, **tied), STEPS)
    padded = recipe_in(tmp_path, 61, 3, **changes)
    assert_same(run("simulated", padded.world_size(), train, padded, STEPS), plain)


def counted(communicator: Communicator, recipe: Recipe) -> int:
    state = made(communicator, recipe)
    count = state.engine.parameters
    state.engine.close()
    return count


@in_turns(kind=[(engine, stage) for engine, stages in ENGINES.items() for stage in stages], frozen=[True, False])
def test_padding_is_not_counted_as_parameters(tmp_path: Path, kind: tuple[str, int], frozen: bool) -> None:
    engine, stage = kind
    changes: dict[str, Any] = {"optim__groups": [{"pattern": "embedding.weight", "frozen": True}]} if frozen else {}
    changes |= {"parallel__engine": engine, "parallel__zero": stage, "parallel__bucket_bytes": ParallelConfig.bucket_bytes}
    recipe = recipe_in(tmp_path, 61, 2, parallel__data=2, train__dtype="float32", **changes)
    counts = run("gloo", 4, counted, recipe)
    assert sum(counts) == sum(prod(shape) for shape in parameter_shapes(recipe.model).values())


def saved_with_padding(communicator: Communicator, recipe: Recipe, multiple: int) -> list:  # type: ignore[type-arg]
    """A checkpoint as runs wrote it that held their padding to be a part of the model."""
    state = made(communicator, recipe)
    train_step(state, 0)
    rows = -(-recipe.model.vocab // multiple) * multiple
    pieces = []
    for piece in state.engine.pieces():
        if piece.name.endswith(VOCABULARY):
            padding = piece.tensor.new_full((rows - recipe.model.vocab, recipe.model.hidden), 0.25)
            pieces.append(TensorPiece(piece.name, (rows, recipe.model.hidden), (0, 0), torch.cat([piece.tensor, padding])))
        else:
            pieces.append(piece)
    metadata = metadata_of(state, STEPS)
    metadata["identity"]["model.vocab_multiple"] = multiple
    for key in ("moe.renormalise", "moe.bias_rate", "norm", "activation", "positions", "max_positions", "head_dim", "qk_norm",
                "bias", "embedding_norm"):  # fmt: skip
        del metadata["identity"][f"model.{key}"]  # the checkpoint is older
    save(checkpoints_of(state), STEPS, pieces, metadata, state.mesh.group("world"), 2)
    return pieces_of(state)


def test_a_checkpoint_with_its_padding_is_still_read(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, 61, model__vocab_multiple=8, parallel__bucket_bytes=2**20)
    saved = gather(run("simulated", 1, saved_with_padding, recipe, 8))
    ranks = run("simulated", 3, read, recipe_in(tmp_path, 61, 3))
    assert not any(rows for _, rows in ranks)
    whole = gather([pieces for pieces, _ in ranks])
    assert all((whole[name] == saved[name]).all() for name in saved)


def test_a_router_that_could_not_learn_is_not_gone_on_with(tmp_path: Path) -> None:
    moe = {"model__moe__experts": 4, "model__moe__ffn": 24, "model__moe__top_k": 1}
    run("simulated", 1, saved_with_padding, recipe_in(tmp_path, 61, parallel__bucket_bytes=2**20, **moe), 1)
    with pytest.raises(RecipeError, match=r"its router learnt nothing from the loss: give another run\.dir") as refused:
        run("simulated", 1, read, recipe_in(tmp_path, 61, **moe))
    assert "\n" not in str(refused.value)


def test_another_padding_is_not_another_run(tmp_path: Path) -> None:
    before = recipe_in(tmp_path, 97)
    save_recipe(before)
    run("simulated", 1, trained, before)
    preflight.check_run_directory(recipe_in(tmp_path, 97, 2, model__vocab_multiple=2, checkpoint__resume=True))
    with pytest.raises(RecipeError, match=r"has model\.vocab=97, not 98"):
        preflight.check_run_directory(recipe_in(tmp_path, 98, 2, checkpoint__resume=True))


def test_fewer_workers_are_not_kept_away_by_the_vocabulary(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, 97, 4, restart__elastic=True)
    assert [fitted(recipe, ranks)[1] for ranks in (4, 3, 2, 1)] == [4, 3, 2, 1]
