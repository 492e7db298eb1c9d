"""Invariant 2: a resumed run is bit for bit the run that was never stopped; on another layout it goes on as the same run."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.data.tokenised import Corpus
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import StepResult, train_step
from tests.covering import covering
from tests.harness import ON_GPU, run
from tests.parity import as_numpy, gather, pieces_of, small_recipe, working_tensors
from tests.trainer.states import load_state, save_state

HALF, WHOLE = 3, 5
MOE = {"moe__experts": 4, "moe__ffn": 8, "moe__every": 2, "moe__shared_experts": 1}
MODELS: dict[str, dict[str, object]] = {
    "dense": {},
    "dense_tied_5_layers": {"tie_embeddings": True, "layers": 5, "vocab": 61, "vocab_multiple": 4},
    "moe": MOE,
    "moe_tied": {**MOE, "tie_embeddings": True, "moe__bias_rate": 0.05},
}
Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]


def recipe_for(folder: Path, model: str, layout: dict[str, object], **changes: object) -> Recipe:
    return small_recipe(
        run__dir=str(folder),
        train__steps=WHOLE,
        **{f"model__{key}": value for key, value in MODELS[model].items()},
        **{f"parallel__{key}": value for key, value in layout.items()},
        **{"train__micro_batch": 1 if layout.get("data") == 8 else 2, **changes},
    )


def corpus_of(recipe: Recipe) -> Corpus:
    return prepare(recipe.data, recipe.model.vocab)


def fresh(communicator: Communicator, recipe: Recipe) -> TrainerState:
    parts = assemble(recipe, communicator, corpus_of(recipe))
    parts.scaler.growth_interval = 2  # so that float16's scale and its counter move within a few steps
    return parts


def resumed(communicator: Communicator, recipe: Recipe) -> TrainerState:
    parts = fresh(communicator, recipe)
    path = latest(Path(recipe.run.dir) / "checkpoints")
    assert path is not None
    assert load_state(parts, path) == HALF
    return parts


def everything(parts: TrainerState) -> dict[str, np.ndarray]:
    """All that the next step depends on, on this rank, as bytes."""
    state = {name: tensor.detach().clone().view(torch.uint8).cpu().numpy() for name, tensor in working_tensors(parts)}
    for index, shard in enumerate(parts.engine.optimizer.shards()):
        state |= {f"{index}/{key}": as_numpy(value) for key, value in shard.items()}
    scaler = parts.scaler
    return state | {"counters": np.array([parts.updates, scaler.scale, scaler.good_steps])}


def assert_equal_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.tobytes() == other[name].tobytes(), name


def in_two_halves(communicator: Communicator, recipe: Recipe) -> Any:
    """Train in one go; then half, save, forget, load and train the rest. What each of the ways led to."""
    straight = fresh(communicator, recipe)
    expected = [train_step(straight, step) for step in range(WHOLE)]
    first = fresh(communicator, recipe)
    results = [train_step(first, step) for step in range(HALF)]
    save_state(first, HALF)
    at_the_stop = everything(first)
    second = resumed(communicator, recipe)
    after_loading = everything(second)
    results += [train_step(second, step) for step in range(HALF, WHOLE)]
    return expected, everything(straight), at_the_stop, after_loading, results, everything(second)


DTYPES = ("float64", "float32", "bfloat16", "float16")
LAYOUTS: list[tuple[str, dict[str, object], tuple[str, ...]]] = [
    ("dense", {}, DTYPES),
    ("dense_tied_5_layers", {"data": 2, "pipeline": 2}, ("float64", "float16")),
    ("dense", {"tensor": 2, "data": 2, "sequence": True, "zero": 0}, ("float32", "bfloat16")),
    ("moe", {"data": 2, "expert": 2}, DTYPES),
    ("moe_tied", {"data": 2, "pipeline": 2, "zero": 2}, ("float64", "bfloat16", "float16")),
    ("moe_tied", {"data": 2, "tensor": 2, "expert": 2, "pipeline": 2}, ("bfloat16",)),
    ("moe_tied", {"data": 2, "pipeline": 2, "zero": 3}, ("bfloat16",)),
]
CASES = [(model, layout, dtype) for model, layout, dtypes in LAYOUTS for dtype in dtypes]


QUICK = covering([{"dtype": dtype, **{f"{key}={value}": True for key, value in (("model", model), *layout.items())}}
                  for model, layout, dtype in CASES])  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", ON_GPU])
@pytest.mark.parametrize(
    ("model", "layout", "dtype"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (index not in QUICK)) for index, case in enumerate(CASES)],
    ids=[f"{m}-{x}-{d}" for m, x, d in CASES],
)
def test_the_same_layout_goes_on_to_the_bit(
    tmp_path: Path, model: str, layout: dict[str, object], dtype: str, backend: str
) -> None:
    recipe = recipe_for(tmp_path, model, layout, train__dtype=dtype)
    if backend == "cpu":
        backend = "gloo" if dtype == "float32" else "simulated"
    for straight, at_end, at_stop, after_loading, results, end in run(backend, recipe.world_size(), in_two_halves, recipe):
        assert repr(results) == repr(straight)  # a norm may be nan, where float16 overflows
        assert_equal_bits(after_loading, at_stop)
        assert_equal_bits(end, at_end)


FROZEN = [{"pattern": name, "frozen": True} for name in ("embedding.weight", "layers.0.*", "*.router.weight")]


def load_half(communicator: Communicator, recipe: Recipe) -> Any:
    parts = resumed(communicator, recipe)
    return pieces_of(parts)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_frozen_parameters_are_saved_and_loaded_on_any_layout(tmp_path: Path, dtype: str) -> None:
    """In a checkpoint they are weights like the others, without moments."""

    def recipe(layout: dict[str, object], frozen: list[dict[str, object]]) -> Recipe:
        return recipe_for(tmp_path, "moe_tied", layout, train__dtype=dtype, optim__groups=frozen)

    first = recipe({"data": 2, "pipeline": 2}, FROZEN)
    for straight, at_end, at_stop, after_loading, results, end in run("simulated", 4, in_two_halves, first):
        assert repr(results) == repr(straight)
        assert_equal_bits(after_loading, at_stop)
        assert_equal_bits(end, at_end)
    saved = gather(run("simulated", 4, load_half, first))
    assert "weight/layers.0.attention.query.weight" in saved
    assert "exp_avg/layers.0.attention.query.weight" not in saved
    for layout in ({}, {"tensor": 2}, {"data": 2, "expert": 2, "pipeline": 2}):
        other = recipe(layout, FROZEN)
        loaded = gather(run("simulated", other.world_size(), load_half, other))
        assert loaded.keys() == saved.keys()
        assert all(np.array_equal(loaded[name], saved[name]) for name in saved)
    for frozen in ([], [*FROZEN, {"pattern": "layers.1.*", "frozen": True}]):
        with pytest.raises(RecipeError, match=r"saved with \S+ (frozen|trained), but .*; freeze the same parameters in optim"):
            run("simulated", 1, load_half, recipe({}, frozen))


def overflow_before_and_after(communicator: Communicator, recipe: Recipe) -> Any:
    parts = fresh(communicator, recipe)
    parts.scaler.scale = 2.0**24  # the first steps are discarded
    results = [train_step(parts, step) for step in range(HALF)]
    save_state(parts, HALF)
    back = resumed(communicator, recipe)
    return [r.committed for r in results], everything(parts), everything(back)


def test_a_scale_in_motion_and_skipped_updates_are_saved(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "dense", {"data": 2}, train__dtype="float16")
    for committed, saved, loaded in run("simulated", 2, overflow_before_and_after, recipe):
        assert not all(committed)
        assert loaded["counters"][0] == sum(committed)
        assert loaded["counters"][1] == 2.0 ** (24 - committed.count(False) + sum(committed) // 2)
        assert_equal_bits(saved, loaded)


def train_and_save(communicator: Communicator, recipe: Recipe) -> tuple[list[StepResult], Pieces, Pieces]:
    """Results of all steps, and the state half way, where it is saved, and at the end."""
    parts = fresh(communicator, recipe)
    results = [train_step(parts, step) for step in range(HALF)]
    save_state(parts, HALF)
    half = pieces_of(parts)
    return results + [train_step(parts, step) for step in range(HALF, WHOLE)], half, pieces_of(parts)


def load_and_train(communicator: Communicator, recipe: Recipe) -> tuple[list[StepResult], Pieces, Pieces]:
    parts = resumed(communicator, recipe)
    half = pieces_of(parts)
    return [train_step(parts, step) for step in range(HALF, WHOLE)], half, pieces_of(parts)


MOVES: list[tuple[str, dict[str, object], list[dict[str, object]]]] = [
    (
        "dense_tied_5_layers",
        {"data": 2, "pipeline": 2},
        [{}, {"data": 2, "zero": 0}, {"data": 8}, {"tensor": 2, "pipeline": 3, "balance": [1, 3, 1]},
         {"tensor": 4, "data": 2, "sequence": True}, {"data": 2, "pipeline": 2, "balance": [4, 1], "bucket_bytes": 1}],
    ),
    ("dense", {"tensor": 2, "data": 2, "zero": 0}, [{}, {"data": 2}, {"tensor": 4, "data": 2}, {"pipeline": 4, "data": 2}]),
    (
        "moe",
        {"data": 4, "expert": 2},
        [{}, {"data": 2, "expert": 2}, {"data": 8, "expert": 4}, {"tensor": 2},
         {"data": 2, "expert": 2, "tensor": 2, "pipeline": 2}],
    ),
    ("moe_tied", {"data": 2, "expert": 2, "pipeline": 2}, [{}, {"data": 2, "zero": 3}, {"data": 4, "expert": 4, "tensor": 2}]),
    ("moe_tied", {"data": 2, "expert": 2, "zero": 3}, [{}, {"data": 2, "zero": 0}, {"data": 4, "expert": 2, "zero": 3}]),
]  # fmt: skip


@pytest.mark.parametrize(("model", "before", "after"), MOVES, ids=[f"{m}-{x}" for m, x, _ in MOVES])
def test_another_layout_takes_over_the_exact_state_and_the_same_curve(
    tmp_path: Path, model: str, before: dict[str, object], after: list[dict[str, object]]
) -> None:
    recipe = recipe_for(tmp_path, model, before)
    saved = run("simulated", recipe.world_size(), train_and_save, recipe)
    expected_half, expected_end = gather([half for _, half, _ in saved]), gather([end for *_, end in saved])
    for layout in after:
        recipe = recipe_for(tmp_path, model, layout)
        ranks = run("simulated", recipe.world_size(), load_and_train, recipe)
        assert_equal_bits(gather([half for _, half, _ in ranks]), expected_half)
        for results, *_ in ranks:
            for figure in ("loss", "grad_norm", "balance_loss", "lr"):
                found, straight = ([getattr(r, figure) for r in rs] for rs in (results, saved[0][0][HALF:]))
                np.testing.assert_allclose(found, straight, rtol=1e-9, err_msg=f"{figure} {layout}")
        for name, value in gather([end for *_, end in ranks]).items():
            scale = np.abs(expected_end[name]).max()
            np.testing.assert_allclose(value, expected_end[name], rtol=1e-9, atol=1e-9 * scale, err_msg=f"{name} {layout}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_masters_survive_a_change_of_layout(tmp_path: Path, dtype: str) -> None:
    before = recipe_for(tmp_path, "moe_tied", {"data": 4, "expert": 2}, train__dtype=dtype)
    saved = run("gloo", 4, train_and_save, before)
    after = recipe_for(tmp_path, "moe_tied", {"data": 1, "tensor": 2, "pipeline": 2}, train__dtype=dtype)
    loaded = run("gloo", 4, load_and_train, after)
    assert_equal_bits(gather([half for _, half, _ in loaded]), gather([half for _, half, _ in saved]))


class Recording:
    """Batches that note which samples they hand out."""

    def __init__(self, parts: TrainerState) -> None:
        self.batches, self.samples = parts.batches, Counter[int]()

    def batch(self, step: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.samples.update(self.batches.sample_ids(step)[start : start + count].tolist())
        return self.batches.batch(step, start, count)


SEQUENCES = 56
"""An epoch that ends within the last step of the first half of a longer run."""


def seen(communicator: Communicator, recipe: Recipe, first: int, stop: int) -> Counter[int]:
    """Samples of steps first .. stop on this rank, if it is the one of its replica that counts."""
    tokens = np.random.default_rng(0).integers(0, 64, SEQUENCES * recipe.data.sequence_length + 1).astype(np.uint16)
    corpus = Corpus(64, tokens, tokens, np.ones(64, np.int64), "made up", None)
    parts = assemble(recipe, communicator, corpus)
    if first:
        path = latest(Path(recipe.run.dir) / "checkpoints")
        assert path is not None
        first = load_state(parts, path)
    recording = Recording(parts)
    parts.batches = recording  # type: ignore[assignment]
    for step in range(first, stop):
        train_step(parts, step)
    if stop < 14:
        save_state(parts, stop)
    return recording.samples if parts.mesh.at("tensor") == parts.mesh.at("pipeline") == 0 else Counter()


def test_every_sample_is_used_once_an_epoch_over_stops_and_changes_of_layout(tmp_path: Path) -> None:
    """Two epochs of 56 sequences in 14 steps of 8, in three parts."""
    total = Counter[int]()
    layouts: list[dict[str, object]] = [{"data": 2, "pipeline": 2}, {"data": 4}, {"tensor": 2}]
    for layout, first, stop in zip(layouts, (0, 4, 9), (4, 9, 14), strict=True):
        recipe = recipe_for(tmp_path, "dense", layout, data__source="made up")
        for samples in run("simulated", recipe.world_size(), seen, recipe, first, stop):
            total += samples
        if stop == 4:
            assert max(total.values()) == 1
            assert total.total() == 32
    assert total == dict.fromkeys(range(SEQUENCES), 2)


def refused(communicator: Communicator, recipe: Recipe) -> tuple[str, bool]:
    """The message, and whether every bit is as before."""
    parts = fresh(communicator, recipe)
    before = everything(parts)
    path = latest(Path(recipe.run.dir) / "checkpoints")
    assert path is not None
    with pytest.raises(RecipeError) as error:
        load_state(parts, path)
    after = everything(parts)
    return str(error.value), all(value.tobytes() == after[name].tobytes() for name, value in before.items())


DIFFERENCES: list[tuple[str, object, str]] = [
    ("model__vocab", 60, "model.vocab=64 but the recipe has 60"),
    ("model__layers", 3, "model.layers=4 but the recipe has 3"),
    ("model__hidden", 32, "model.hidden=16 but the recipe has 32"),
    ("model__kv_heads", 2, "model.kv_heads=4 but the recipe has 2"),
    ("model__rope_theta", 500.0, "model.rope_theta=10000.0 but the recipe has 500.0"),
    ("model__norm_epsilon", 1e-6, "model.norm_epsilon=1e-05 but the recipe has 1e-06"),
    ("model__norm", "layer", "model.norm=rms but the recipe has layer"),
    ("model__activation", "gelu", "model.activation=swiglu but the recipe has gelu"),
    ("model__positions", "alibi", "model.positions=rotary but the recipe has alibi"),
    ("model__head_dim", 8, "model.head_dim=null but the recipe has 8"),
    ("model__qk_norm", True, "model.qk_norm=false but the recipe has true"),
    ("model__bias", "attention", "model.bias=none but the recipe has attention"),
    ("model__embedding_norm", True, "model.embedding_norm=false but the recipe has true"),
    ("model__tie_embeddings", True, "model.tie_embeddings=false but the recipe has true"),
    ("model__moe__experts", 2, "model.moe.experts=0 but the recipe has 2"),
    ("run__seed", 1, "run.seed=0 but the recipe has 1"),
    ("data__sequence_length", 16, "data.sequence_length=8 but the recipe has 16"),
    ("data__global_batch", 16, "data.global_batch=8 but the recipe has 16"),
]


def test_another_model_data_or_seed_is_refused_with_key_and_both_values(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "dense", {"data": 2})
    run("simulated", 2, train_and_save, recipe)
    for key, value, message in DIFFERENCES:
        for text, unchanged in run("simulated", 2, refused, recipe_for(tmp_path, "dense", {"data": 2}, **{key: value})):
            assert f"was saved with {message}" in text
            assert f"give {message.split(' ')[0]}" in text
            assert "\n" not in text
            assert unchanged


def refused_corpus(communicator: Communicator, recipe: Recipe) -> str:
    corpus = replace(corpus_of(recipe), fingerprint="another text")
    parts = assemble(recipe, communicator, corpus)
    path = latest(Path(recipe.run.dir) / "checkpoints")
    assert path is not None
    with pytest.raises(RecipeError) as error:
        load_state(parts, path)
    return str(error.value)


def test_another_text_under_the_same_name_is_refused(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "dense", {})
    run("simulated", 1, train_and_save, recipe)
    (text,) = run("simulated", 1, refused_corpus, recipe)
    assert "random-64" in text
    assert "another text" in text
    assert "data.source" in text, "a fingerprint is nothing to type: the fix is to give back the data"


def test_what_may_change_is_accepted(tmp_path: Path) -> None:
    run("simulated", 2, train_and_save, recipe_for(tmp_path, "dense", {"data": 2}))
    changes = {"optim__lr": 1e-4, "train__micro_batch": 4, "train__recompute": "full", "run__name": "other"}
    run("simulated", 2, load_and_train, recipe_for(tmp_path, "dense", {"data": 2}, **changes))


def test_float64_and_the_others_do_not_take_over_from_each_other(tmp_path: Path) -> None:
    run("simulated", 1, train_and_save, recipe_for(tmp_path, "dense", {}))
    ((text, unchanged),) = run("simulated", 1, refused, recipe_for(tmp_path, "dense", {}, train__dtype="bfloat16"))
    assert "was saved with train.dtype=float64 but the recipe has bfloat16; give train.dtype=float64" in text
    assert unchanged


def test_float16_takes_over_from_bfloat16_with_a_scale_of_its_own(tmp_path: Path) -> None:
    saved = run("simulated", 1, train_and_save, recipe_for(tmp_path, "dense", {}, train__dtype="bfloat16"))
    recipe = recipe_for(tmp_path, "dense", {}, train__dtype="float16")
    (counters,) = run("simulated", 1, lambda c, r: everything(resumed(c, r))["counters"], recipe)
    assert counters.tolist() == [HALF, 2.0**16, 0]
    loaded = run("simulated", 1, load_and_train, recipe)
    assert_equal_bits(gather([loaded[0][1]]), gather([saved[0][1]]))


def saved_at_half(communicator: Communicator, recipe: Recipe) -> None:
    parts = fresh(communicator, recipe)
    for step in range(HALF):
        train_step(parts, step)
    save_state(parts, HALF)


def biases(communicator: Communicator, recipe: Recipe) -> list[float]:
    """Resumes from the checkpoint, trains a step, and returns the biases of the first mixture."""
    parts = resumed(communicator, recipe)
    train_step(parts, HALF)
    return parts.engine.untrained[0].tensor.tolist()


def test_the_rate_of_biases_may_change_and_0_keeps_them(tmp_path: Path) -> None:
    def at_rate(rate: float | None) -> Recipe:
        return recipe_for(tmp_path, "moe", {"data": 2}, model__moe__bias_rate=rate)

    run("simulated", 2, saved_at_half, at_rate(0.05))
    kept, faster = (run("simulated", 2, biases, at_rate(rate))[0] for rate in (0.0, 0.25))
    assert any(kept)
    assert {round(abs(one - other), 9) for one, other in zip(kept, faster, strict=True)} <= {0.0, 0.25}
    assert kept != faster
    with pytest.raises(RecipeError, match=r"model\.moe\.bias_rate=0\.05 but the recipe has null; give model\.moe\.bias_rate=0\.05"):
        run("simulated", 2, biases, at_rate(None))


def test_biases_are_not_added_to_a_model_that_had_none(tmp_path: Path) -> None:
    run("simulated", 2, saved_at_half, recipe_for(tmp_path, "moe", {"data": 2}))
    with pytest.raises(RecipeError, match=r"model\.moe\.bias_rate=null but the recipe has 0\.05; give model\.moe\.bias_rate=null"):
        run("simulated", 2, biases, recipe_for(tmp_path, "moe", {"data": 2}, model__moe__bias_rate=0.05))
