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
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.parallel.config import ParallelConfig
from bagualu.trainer import run as whole_run
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.generation.stages import load_stages
from bagualu.trainer.models.decoder.config import MoEConfig
from bagualu.trainer.operators import float8
from bagualu.trainer.operators.registry import FLOAT8
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.trace import Traced, trace
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import as_numpy, small_recipe, train, working_tensors
from tests.trainer.states import load_state, save_state
from tests.trainer.test_half_gradients import gradients

STEPS = 50
OF_BFLOAT16 = 0.08
"""The most by which the loss of a step may differ from that of the run in bfloat16, relative to it. A run in bfloat16 differs from
one in float32 by 0.025, those in float8 from bfloat16 by up to 0.044, with either sign."""
OF_LAYOUTS = 0.08
"""The same for two layouts, where up to 0.043 was seen. What a matrix's scale is computed over depends on the layout, and so do
the places where sums are rounded."""
OF_ENGINES = 0.02
"""The same for engines that divide the data alike, where up to 0.008 was seen: gradients are the same, but are added up in another
order."""
MOE: dict[str, Any] = {"model__moe__experts": 4, "model__moe__top_k": 2, "model__moe__ffn": 32, "model__moe__every": 2}
DENSE: dict[str, Any] = {"model__moe": MoEConfig()}
OF_THE_END = 0.01
"""The same of the mean of the last 20 steps."""
OF_GRADIENTS = (0.15, 0.2)
"""The largest error of a parameter's gradient, relative, in the Euclidean norm, by variant. They are up to 0.10 and 0.14; were 30%
of a gradient's numbers zero, its error would be 0.55."""
OTHER_ENGINES: dict[str, Any] = {"comm__backend": "gloo", "parallel__bucket_bytes": ParallelConfig().bucket_bytes}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data": (2, {"parallel__data": 2}),
    "tensor": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "pipeline, weight gradients put off": (2, {"parallel__pipeline": 2, "parallel__schedule": "zb_h1"}),
    "expert, recompute": (2, {"parallel__data": 2, "parallel__expert": 2, "train__recompute": "full"}),
    "zero 3": (2, {"parallel__data": 2, "parallel__zero": 3}),
    "fsdp": (2, {"parallel__data": 2, "parallel__engine": "fsdp", **OTHER_ENGINES}),
    "deepspeed": (2, {"parallel__data": 2, "parallel__engine": "deepspeed", "parallel__zero": 2, **OTHER_ENGINES}),
}


def recipe_of(dtype: str = "float8", **changes: Any) -> Recipe:
    """A model with widths that float8 products take, on a text of sentences that it can learn."""
    sizes = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "vocab": 128, "layers": 2, "initial_std": 0.05}
    keys = {f"model__{key}": value for key, value in sizes.items()} | {"train__dtype": dtype, "train__micro_batch": 2}
    optim = {"optim__lr": 1e-2, "optim__warmup_steps": 5, "optim__clip_norm": 1.0}
    fixed = {**keys, **MOE, **optim, "train__steps": STEPS, "data__sequence_length": 16}
    return small_recipe(**{**fixed, **changes})


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
    return replace(recipe, data=replace(recipe.data, source=str(path), format="llmc", cache=str(path.parent)))


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokens(tmp_path_factory.mktemp("ids"))


@cache
def losses(path: Path, dtype: str, linear: str, layout: str | None = None) -> np.ndarray:
    ranks, changes = LAYOUTS[layout] if layout else (1, {})
    recipe = text_of(recipe_of(dtype, operators__linear=linear, **changes), path)
    return np.array(run(changes.get("comm__backend", "simulated"), ranks, train, recipe, STEPS // 2 if layout else STEPS)[0].losses)


@pytest.mark.parametrize("variant", FLOAT8)
def test_the_curve_is_that_of_bfloat16(ids: Path, variant: str) -> None:
    half, narrow = losses(ids, "bfloat16", "torch"), losses(ids, "float8", variant)
    assert half[-1] < 0.8 * half[0], "there is something to learn"
    assert not np.array_equal(half, narrow)
    assert np.abs(narrow / half - 1).max() < OF_BFLOAT16
    assert abs(narrow[-20:].mean() / half[-20:].mean() - 1) < OF_THE_END


@pytest.mark.parametrize(("variant", "largest"), list(zip(FLOAT8, OF_GRADIENTS, strict=True)))
def test_gradients_are_the_exact_ones_rounded(variant: str, largest: float) -> None:
    (exact,) = run("simulated", 1, gradients, recipe_of("float64", **DENSE))
    (found,) = run("simulated", 1, gradients, recipe_of("float8", operators__linear=variant, **DENSE))
    assert found.keys() == exact.keys()
    errors = {name: ((found[name] - value).norm() / value.norm()).item() for name, value in exact.items()}
    assert max(errors.values()) < largest, errors


@pytest.mark.parametrize(
    ("layout", "variant"),
    [
        pytest.param(
            layout,
            variant,
            marks=[] if layout == "tensor" or (variant == FLOAT8[0] and layout != "deepspeed") else pytest.mark.slow,
        )
        for layout in LAYOUTS
        for variant in FLOAT8
    ],
)
def test_the_curve_is_nearly_the_same_on_any_layout(ids: Path, layout: str, variant: str) -> None:
    one, other = losses(ids, "float8", variant), losses(ids, "float8", variant, layout)
    one = one[: len(other)]
    assert np.abs(other / one - 1).max() < OF_LAYOUTS
    if layout in ("fsdp", "deepspeed"):
        assert np.abs(other / losses(ids, "float8", variant, "data") - 1).max() < OF_ENGINES
    if layout.startswith("pipeline"):
        assert np.array_equal(one, other), "stages multiply the same matrices"


def fresh(communicator: Communicator, recipe: Recipe) -> TrainerState:
    return assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))


def bits(communicator: Communicator, recipe: Recipe, begin: int, end: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """The losses of steps `begin` to `end`, and the working weights after them. Unless the run begins, its state comes from its
    checkpoint; it is saved at the end."""
    state = fresh(communicator, recipe)
    if begin:
        path = latest(Path(recipe.run.dir) / "checkpoints")
        assert path is not None
        assert load_state(state, path) == begin
    found = [train_step(state, step).loss for step in range(begin, end)]
    save_state(state, end)
    return found, {name: as_numpy(tensor) for name, tensor in working_tensors(state)}


@pytest.mark.parametrize("variant", FLOAT8)
@pytest.mark.parametrize("layout", ["tensor", "expert, recompute"])
def test_a_resumed_run_is_bit_for_bit_the_same(tmp_path: Path, variant: str, layout: str) -> None:
    ranks, changes = LAYOUTS[layout]
    recipes = [recipe_of(operators__linear=variant, run__dir=str(tmp_path / name), **changes) for name in ("whole", "halves")]
    whole = run("simulated", ranks, bits, recipes[0], 0, 4)
    first = run("simulated", ranks, bits, recipes[1], 0, 2)
    second = run("simulated", ranks, bits, recipes[1], 2, 4)
    for (losses, weights), (before, _), (after, same) in zip(whole, first, second, strict=True):
        assert losses == before + after
        assert all(np.array_equal(same[name], values) for name, values in weights.items())


def one_step(communicator: Communicator, recipe: Recipe) -> None:
    train_step(fresh(communicator, recipe), 0)


Product = tuple[tuple[int, ...], tuple[int, ...]]
LORA: dict[str, Any] = {"model__lora__rank": 16, "model__lora__targets": ["*"]}


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(1, DENSE, id="dense"),
        pytest.param(2, {**DENSE, **LAYOUTS["tensor"][1]}, id="tensor"),
        pytest.param(2, {**DENSE, **LAYOUTS["pipeline, weight gradients put off"][1]}, id="weight gradients put off"),
        pytest.param(1, {**DENSE, "train__recompute": "full"}, id="recompute"),
        pytest.param(1, {**DENSE, "model__ffn": 88}, id="widths that are no multiples of 16 stay in bfloat16"),
        pytest.param(1, {**DENSE, **LORA}, id="low-rank factors"),
        pytest.param(1, {}, id="experts"),
        pytest.param(2, LAYOUTS["expert, recompute"][1], id="experts on two ranks"),
    ],
)
def test_the_products_in_float8_are_those_of_the_trace(
    monkeypatch: pytest.MonkeyPatch, ranks: int, changes: dict[str, Any]
) -> None:
    recipe = recipe_of(**changes)
    seen: list[Product] = []
    plain = float8.scaled_mm
    monkeypatch.setattr(
        float8, "scaled_mm", lambda a, b, *rest, **named: seen.append((a.shape, b.shape)) or plain(a, b, *rest, **named)
    )
    run("simulated", ranks, one_step, recipe)
    executed = list(seen)  # a trace calls the same function
    traced = [
        tuple(given.shape for given in operator.inputs if given.dtype.startswith("float8"))
        for rank in range(ranks)
        for operator in trace(recipe, ranks, rank, Traced("cpu")).operators()
        if operator.flops
    ]
    of_trace = Counter(shapes for shapes in traced if shapes)
    assert of_trace
    if recipe.model.moe.experts:  # routers decide how many rows an expert has
        assert Counter(map(widths, of_trace.elements())) == Counter(map(widths, executed))
    else:
        assert of_trace == Counter(map(padded, executed))


def widths(product: Product) -> tuple[int, ...]:
    """The widths of the layer to which a product belongs, which are multiples of 16 and known, in order."""
    return tuple(sorted(size for size in {*product[0], *product[1]} if size in (32, 64, 96, 128)))


def padded(product: Product) -> Product:
    """Shapes of a product as plain tuples. These tests have numbers of tokens that need no padding."""
    return tuple(product[0]), tuple(product[1])


def trained(communicator: Communicator, recipe: Recipe) -> dict[str, Any]:
    return whole_run.train(recipe, communicator)


def in_folder(folder: Path, dtype: str = "float8", **changes: Any) -> Recipe:
    return recipe_of(dtype, **{"run__dir": str(folder), "checkpoint__every": 2, "train__steps": 2, **changes})


def test_a_run_records_its_variant_and_says_that_a_cpu_is_slow(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (summary,) = run("simulated", 1, trained, in_folder(tmp_path))
    record = json.loads((tmp_path / "operators.json").read_text())["operators"]["linear"]
    assert (record["variant"], record["why"]) == ("float8_rowwise", "usual")
    assert summary["operators"]["linear"] == "float8_rowwise"
    said = capfd.readouterr().err
    assert "train.dtype=float8: a CPU computes products in float8, but slowly; this is for trying out\n" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, ""),
        ({"model__kv_heads": 1, "model__heads": 8, "model__ffn": 88},
         "linear layers of width 8 (model.kv_heads) and 88 (model.ffn)"),
    ],
)  # fmt: skip
def test_a_run_says_which_layers_stay_in_bfloat16(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: dict[str, Any], said: str
) -> None:
    run("simulated", 1, trained, in_folder(tmp_path, **words))
    lines = [line for line in capfd.readouterr().err.splitlines() if "multiply in bfloat16" in line]
    expected = f"train.dtype=float8: {said} on a rank multiply in bfloat16, since that is no multiple of 16"
    assert lines == ([expected] if said else [])


def test_a_run_goes_on_in_another_dtype_and_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run("simulated", 1, trained, in_folder(tmp_path, "bfloat16"))
    variants = []
    for steps, dtype, linear in (
        (4, "float8", "auto"),
        (6, "float8", "float8_tensorwise"),
        (8, "float8", "auto"),
        (10, "bfloat16", "auto"),
    ):
        changes = {"train__steps": steps, "operators__linear": linear, "checkpoint__resume": True}
        (summary,) = run("simulated", 1, trained, in_folder(tmp_path, dtype, **changes))
        variants.append(summary["operators"]["linear"])
        assert summary["step"] == steps
    assert variants == ["float8_rowwise", "float8_tensorwise", "float8_tensorwise", "torch"]
    said = capfd.readouterr().err
    assert "train.dtype=float8: linear layers had operators.linear=torch so far, have float8_rowwise now\n" in said
    assert "train.dtype=bfloat16: linear layers had operators.linear=float8_tensorwise so far, have torch now\n" in said


def loaded(communicator: Communicator, recipe: Recipe) -> set[str]:
    path = latest(Path(recipe.run.dir) / "checkpoints")
    assert path is not None
    stages = load_stages(recipe, communicator, path)
    return {type(module.products).__name__ for module in stages.model.modules() if hasattr(module, "products")}


@pytest.mark.parametrize("linear", ["auto", "float8_tensorwise"])
def test_such_a_run_generates_on_a_chip_without_float8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linear: str) -> None:
    recipe = in_folder(tmp_path, operators__linear=linear)
    run("simulated", 1, trained, recipe)
    monkeypatch.setattr(float8.ProductsInFloat8, "lacks_on", lambda self, chip: "a better chip")
    assert run("simulated", 1, loaded, recipe) == [{"Products"}]
    with pytest.raises(RecipeError, match="needs a better chip"):
        run("simulated", 1, trained, replace(recipe, run=replace(recipe.run, dir=str(tmp_path / "another"))))


@pytest.mark.parametrize(
    ("dtype", "linear", "said"),
    [
        ("float8", "torch", "operators.linear=torch does not multiply in float8, as train.dtype=float8 asks for; give "
         "operators.linear=float8_rowwise or float8_tensorwise, or train.dtype=bfloat16"),
        ("float8", "panels", "operators.linear=panels does not multiply in float8"),
        ("bfloat16", "float8_rowwise", "operators.linear=float8_rowwise is for train.dtype=float8, but the recipe has "
         "train.dtype=bfloat16; give train.dtype=float8, or operators.linear=auto"),
        ("float32", "float8_tensorwise", "the recipe has train.dtype=float32"),
    ],
)  # fmt: skip
def test_a_dtype_and_a_variant_that_do_not_go_together_are_refused(dtype: str, linear: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_of(dtype, operators__linear=linear).validate(1)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"model__hidden": 40, "model__heads": 4, "model__ffn": 64}, "model.hidden=40 by 40 and 20 and 64 and 32"),
        ({"model__ffn": 40, "parallel__tensor": 4, "model__heads": 4, "model__kv_heads": 4, "model__hidden": 32},
         "model.hidden=32 by 8 and 10"),
    ],
)  # fmt: skip
def test_a_model_of_which_no_layer_can_multiply_in_float8_is_refused(words: dict[str, Any], named: str) -> None:
    recipe = recipe_of("float8", **words)
    with pytest.raises(RecipeError) as error:
        recipe.validate(words.get("parallel__tensor", 1))
    assert str(error.value) == (f"train.dtype=float8 multiplies matrices whose widths are multiples of 16, and no layer has such a "
                                f"matrix on a rank ({named}); change the model's widths, or give train.dtype=bfloat16")  # fmt: skip
    replace(recipe, model=replace(recipe.model, hidden=64, ffn=64)).validate(words.get("parallel__tensor", 1))


def spoilt(communicator: Communicator, recipe: Recipe) -> bool:
    state = fresh(communicator, recipe)
    with torch.no_grad():
        state.engine.model.layers["0"].attention.query.weight[0, 0] = torch.inf
    return train_step(state, 0).committed


@pytest.mark.parametrize("variant", FLOAT8)
def test_a_step_that_is_not_finite_is_not_committed(variant: str) -> None:
    assert run("simulated", 1, spoilt, recipe_of(operators__linear=variant, guard__on_nonfinite="skip")) == [False]
