"""Factors trained beside the weights of a published model: how they begin, go on elsewhere, and become part of the weights."""

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.trainer.assemble import assemble
from bagualu.trainer.conversion import export_model as exporting
from bagualu.trainer.conversion.export_model import export_model
from bagualu.trainer.conversion.import_model import import_model
from bagualu.trainer.conversion.origin import values_of
from bagualu.trainer.conversion.portions import portions
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.generation.find import compose_layout, find_model
from bagualu.trainer.generation.stages import load_stages
from bagualu.trainer.models.decoder.cache import cached
from bagualu.trainer.models.decoder.lora import FIRST, SECOND
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.models.hugging_face.directory import open_model
from bagualu.trainer.models.hugging_face.read import Reader
from bagualu.trainer.recipe.compose import compose, load_recipe, save_recipe
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.preflight import check, check_run_directory
from bagualu.trainer.run import train
from tests.harness import run
from tests.parity import gather, pieces_of
from tests.standing import newest_tensors
from tests.trainer.models.hugging_face.published import logits, publish, tokens
from tests.trainer.models.hugging_face.test_parity import own_logits

SMALL = shlex.split(
    "recipe=finetune data.source=random data.sequence_length=8 data.global_batch=8 train.steps=2 train.dtype=float64 "
    "train.validation_sequences=0 train.sample_every=0 optim.lr=1e-2 optim.warmup_steps=1 comm.backend=simulated log.progress=off "
    "checkpoint.every=1"
)
LORA = ["model.lora.rank=4", "model.lora.alpha=6"]
LAYOUTS = [
    [],
    ["parallel.data=2", "parallel.tensor=2", "parallel.sequence=true"],
    ["parallel.data=2", "parallel.pipeline=2", "parallel.zero=2"],
    ["parallel.data=4", "parallel.zero=3"],
]


def trained(communicator: Communicator, recipe: Recipe) -> dict[str, Any]:
    return train(recipe, communicator)


def begun(communicator: Communicator, recipe: Recipe) -> Any:
    return pieces_of(assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab), values_of(recipe, communicator)))


def tuned(folder: Path, *words: str) -> Recipe:
    """Trains from folder/published into folder/run, unless `words` say otherwise, and returns the recipe."""
    recipe = compose([*SMALL, *LORA, f"model.from={folder}/published", f"run.dir={folder}/run", *words])
    check(recipe, recipe.world_size())
    save_recipe(recipe)
    run("simulated", recipe.world_size(), trained, recipe)
    return recipe


def adapted_logits(recipe: Recipe, path: Path) -> torch.Tensor:
    """The logits [B, S, V] of the decoder with the factors of the newest checkpoint of a run beside its weights."""
    model = Decoder(recipe.model, [LayerSlice.of_layers(range(recipe.model.layers))]).double()
    values = {name.removeprefix("weight/"): tensor for name, tensor in newest_tensors(path).items() if name.startswith("weight/")}
    assert not model.load_state_dict(values, strict=False).unexpected_keys
    with torch.no_grad():
        return model(tokens())[0]


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_run_begins_with_the_published_weights_and_new_factors(layout: list[str], tmp_path: Path) -> None:
    publish("qwen3_moe", tmp_path / "published", torch.float64)
    more = ["parallel.expert=2"] if "parallel.data=2" in layout else []
    recipe = compose([*SMALL, *LORA, *layout, *more, f"model.from={tmp_path}/published"])
    pieces = gather(run("simulated", recipe.world_size(), begun, recipe))
    found = open_model(tmp_path / "published")
    for part in found.parts:
        expected = Reader(found).fill(part.parameter, part.box.stop, part.box)
        got = torch.from_numpy(pieces[f"weight/{part.parameter}"])[part.box.slices((0,) * len(part.box.shape))]
        assert torch.equal(got, expected), part.parameter
    assert not any(values.any() for name, values in pieces.items() if name.endswith(SECOND))
    assert all(values.all() for name, values in pieces.items() if name.startswith("weight/") and name.endswith(FIRST))
    alone = compose([*SMALL, *LORA, f"model.from={tmp_path}/published"])
    (expected_pieces,) = run("simulated", 1, begun, alone)
    for name, values in gather([expected_pieces]).items():
        assert values.tobytes() == pieces[name].tobytes(), name


def test_the_first_loss_is_that_of_the_published_model_to_the_bit(tmp_path: Path) -> None:
    publish("llama", tmp_path / "published", torch.float64)
    tuned(tmp_path)
    tuned(tmp_path, "model.lora.rank=null", "model.lora.alpha=null", f"run.dir={tmp_path}/full")
    with_factors, full = losses(tmp_path / "run"), losses(tmp_path / "full")
    assert with_factors[0] == full[0]
    assert with_factors[1] != full[1]


@pytest.mark.parametrize(
    "name", ["llama_with_biases", "mixtral", *(pytest.param(one, marks=pytest.mark.slow) for one in ("olmo3", "qwen3_moe"))]
)
def test_an_export_holds_the_merged_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers computes with them what the decoder computes with factors; so do `generate` and `evaluate`."""
    publish(name, tmp_path / "published", torch.float64)
    recipe = tuned(tmp_path, "parallel.data=2", "parallel.tensor=2")
    expected = adapted_logits(recipe, tmp_path / "run")
    assert (expected - own_logits(tmp_path / "published", torch.float64)).abs().max() > 1e-3
    monkeypatch.setattr(exporting, "portions", partial(portions, most=200))
    result = export_model(tmp_path / "run", tmp_path / "exported")
    assert result["parameters"] == sum(np.prod(part.shape) for part in open_model(tmp_path / "published").parts)
    exported = open_model(tmp_path / "exported")
    assert exported.tensors.keys() == open_model(tmp_path / "published").tensors.keys()
    torch.testing.assert_close(own_logits(tmp_path / "exported", torch.float64), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits(tmp_path / "exported", torch.float64), expected, rtol=1e-9, atol=1e-9)
    export_model(tmp_path / "run", tmp_path / "exported-dcp", form="dcp")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float64).state_dict()
    state = {key: torch.zeros_like(tensor) for key, tensor in merged.items()}
    dcp.load(state, checkpoint_id=tmp_path / "exported-dcp")
    for key, tensor in merged.items():
        assert torch.equal(state[key], tensor), key

    model = find_model(tmp_path / "run")
    layout = compose_layout("generate", model, ["parallel.tensor=2"], str(tmp_path), "give one")
    for got in run("simulated", 2, generated_logits, layout, model.checkpoint):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def generated_logits(communicator: Communicator, recipe: Recipe, checkpoint: Path) -> torch.Tensor:
    stages, rows = load_stages(recipe, communicator, checkpoint), tokens()
    with cached(stages.model, torch.zeros(len(rows), dtype=torch.int64), rows.shape[1]) as columns:
        result = stages.logits(rows, columns)
    assert result is not None
    return result


def test_base_weights_are_exported_as_they_were_where_there_are_no_factors(tmp_path: Path) -> None:
    publish("qwen2", tmp_path / "published")
    tuned(tmp_path, "train.dtype=float32", "model.lora.targets=[query,layers.1.*.up.weight]")
    export_model(tmp_path / "run", tmp_path / "exported")
    before, after = (open_model(tmp_path / folder) for folder in ("published", "exported"))
    changed = {part.parameter for part in before.parts if not torch.equal(
        *(Reader(model).fill(part.parameter, part.box.stop, part.box) for model in (before, after)))}  # fmt: skip
    assert changed == {*(f"layers.{i}.attention.query.weight" for i in range(4)), "layers.1.feed_forward.up.weight"}


@pytest.mark.parametrize("dtype", [pytest.param("float64", marks=pytest.mark.slow), "bfloat16"])
def test_a_run_begins_with_the_merged_weights_of_another(dtype: str, tmp_path: Path) -> None:
    """The same bits in every layout; factors that it trains itself are new."""
    publish("qwen3_moe", tmp_path / "published", torch.float64)
    tuned(tmp_path, f"train.dtype={dtype}")
    wide = {"float64": torch.float64, "bfloat16": torch.float32}[dtype]
    export_model(tmp_path / "run", tmp_path / "exported", str(wide).removeprefix("torch."))
    expected = open_model(tmp_path / "exported")
    words = [*SMALL, f"train.dtype={dtype}", f"model.from={tmp_path}/run"]
    alone = None
    for layout in LAYOUTS:
        recipe = compose([*words, *layout])
        assert recipe.model.lora.rank is None
        pieces = gather(run("simulated", recipe.world_size(), begun, recipe))
        alone = alone or pieces
        assert [name for name, values in alone.items() if values.tobytes() != pieces[name].tobytes()] == []
    assert alone is not None
    for part in expected.parts:
        got = torch.from_numpy(alone[f"weight/{part.parameter}"])[part.box.slices((0,) * len(part.box.shape))]
        merged = Reader(expected).fill(part.parameter, part.box.stop, part.box).to(wide)
        rounded = merged.bfloat16().float() if dtype == "bfloat16" else merged
        torch.testing.assert_close(got, rounded, rtol=1e-12 if dtype == "float64" else 2**-7, atol=0)
    again = compose([*words, "model.lora.rank=2"])
    (pieces,) = run("simulated", 1, begun, again)
    own = gather([pieces])
    assert all(own[name].tobytes() == values.tobytes() for name, values in alone.items() if name.startswith("weight/"))
    assert {own[name].shape[-2] for name in own if name.startswith("weight/") and name.endswith(FIRST)} == {2}
    assert not any(values.any() for name, values in own.items() if name.endswith(SECOND))


def test_a_run_goes_on_in_another_layout(tmp_path: Path) -> None:
    """tests/trainer/engine/test_changes.py changes engines too."""
    publish("llama", tmp_path / "published", torch.float64)
    tuned(tmp_path, "train.steps=4", f"run.dir={tmp_path}/straight")
    tuned(tmp_path, "parallel.data=2", "parallel.zero=3")
    (tmp_path / "published").rename(tmp_path / "moved")
    resumed = [f"run.dir={tmp_path}/run", "checkpoint.resume=true", "train.steps=4", "parallel.data=2", "parallel.zero=0",
               "parallel.tensor=2"]  # fmt: skip
    recipe = compose(resumed)
    check(recipe, 4)
    check_run_directory(recipe)
    run("simulated", 4, trained, recipe)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "straight"), rtol=1e-9)
    straight, changed = newest_tensors(tmp_path / "straight"), newest_tensors(tmp_path / "run")
    assert straight.keys() == changed.keys()
    for name, values in straight.items():
        torch.testing.assert_close(changed[name], values, rtol=1e-9, atol=1e-9 * float(values.abs().max()))


def test_factors_need_weights_that_exist(tmp_path: Path) -> None:
    recipe = compose(["recipe=tiny_dense", "data.source=random", "model.lora.rank=8"])
    with pytest.raises(
        RecipeError, match=r"model\.lora\.rank=8 trains factors .*; give model\.from, .* or leave model\.lora\.rank"
    ):
        check(recipe, 1)
    publish("llama", tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "run")
    imported = compose([f"run.dir={tmp_path}/run", "checkpoint.resume=true", "data.source=random", "model.lora.rank=8"])
    with pytest.raises(RecipeError, match=r"the model of a run stays the same: .* has model\.lora\.rank=null, not 8"):
        check_run_directory(imported)


def test_the_factors_of_a_run_stay_the_same(tmp_path: Path) -> None:
    publish("llama", tmp_path / "published")
    tuned(tmp_path)
    resumes = [f"run.dir={tmp_path}/run", "checkpoint.resume=true"]
    for word, was in (
        ("model.lora.rank=8", "rank=4"),
        ("model.lora.alpha=3", "alpha=6.0"),
        ("model.lora.targets=[up]", r"targets=\["),
    ):
        with pytest.raises(RecipeError, match=rf"has model\.lora\.{was}"):
            check_run_directory(compose([*resumes, word]))
    assert load_recipe(tmp_path / "run/config.yaml").model.lora.rank == 4


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("model.lora.rank=0", r"model\.lora\.rank=0 must be at least 1, or leave it out"),
        ("model.lora.targets=[q_proj]", r"model\.lora\.targets: q_proj matches no parameter; give some of query, key"),
        ("optim.groups=[{pattern: '*norm.weight', lr: 1e-4}]", r"\*norm\.weight matches no parameter; .*_lora_"),
        ("optim.groups=[{pattern: '*_lora_?', frozen: true}]", "freezes all parameters; leave some of them to train"),
        ("model.hidden=64", r"model\.hidden=64 contradicts model\.from"),
        ("model.lora.dropout=0.1", r"unknown key model\.lora\.dropout"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(word: str, expected: str, tmp_path: Path) -> None:
    publish("llama", tmp_path)
    with pytest.raises(RecipeError, match=expected) as refused:
        check(compose([*SMALL, *LORA, f"model.from={tmp_path}", word]), 1)
    assert "\n" not in str(refused.value)


def test_the_recipe_asks_for_a_model() -> None:
    with pytest.raises(RecipeError, match=r"model\.from is missing; give the model to begin with, .* e\.g\. model\.from=runs/tiny"):
        compose(["recipe=finetune"])


def test_the_recipe_bears_its_name_and_is_valid(tmp_path: Path) -> None:
    publish("llama", tmp_path)
    recipe = compose(["recipe=finetune", f"model.from={tmp_path}"])
    recipe.validate(recipe.world_size())
    assert (recipe.run.name, recipe.run.dir, recipe.world_size(), recipe.model.hidden) == ("finetune", "runs/finetune", 1, 32)


def test_the_recipe_asks_for_data(tmp_path: Path) -> None:
    """It has no default for them: nobody wants to go on with the standard library's text by mistake."""
    publish("llama", tmp_path)
    words = ["recipe=finetune", f"model.from={tmp_path}", "train.dtype=float32"]
    for empty in ([], ["data.source=' '"]):
        with pytest.raises(
            RecipeError, match=r"data\.source is missing; give the data to train on, .* e\.g\. data\.source=my_texts"
        ):
            check(compose([*words, *empty]), 1)
    assert compose([*words, "data=stdlib"]).data.source == "stdlib"
    check(compose([*words, "data=random"]), 1)
    np.arange(90, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    entry = f"data.blend=[{{source: {tmp_path}/ids.bin, weight: 1}}]"
    check(compose([*words, entry, "data.sequence_length=4", "train.validation_sequences=0", f"data.cache={tmp_path}/cache"]), 1)
