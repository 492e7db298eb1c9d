"""A run begins with the weights that model.from names, on any layout; the keys of the model come from there."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointError
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.trainer.assemble import assemble
from bagualu.trainer.conversion.export_model import export_model
from bagualu.trainer.conversion.import_model import import_model
from bagualu.trainer.conversion.origin import keep_origin, values_of
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.hugging_face.directory import open_model
from bagualu.trainer.models.hugging_face.read import Reader
from bagualu.trainer.recipe.compose import compose, save_recipe
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.origin import kept_tokenizer
from bagualu.trainer.recipe.preflight import check, check_run_directory
from bagualu.trainer.run import train
from tests.harness import run
from tests.parity import gather, pieces_of
from tests.trainer.data.test_records import TEXTS, make_tokenizer
from tests.trainer.models.hugging_face import published
from tests.trainer.models.hugging_face.published import publish

SMALL = shlex.split(
    "recipe=tiny_dense data.source=random data.sequence_length=8 data.global_batch=8 train.micro_batch=1 train.steps=1 "
    "train.validation_sequences=0 optim.lr=1e-2 optim.warmup_steps=1 comm.backend=simulated log.progress=off checkpoint.every=1"
)
LAYOUTS = [
    [],
    ["parallel.data=2", "parallel.tensor=2", "parallel.sequence=true"],
    ["parallel.data=2", "parallel.pipeline=2", "parallel.zero=2"],
    ["parallel.data=4", "parallel.zero=3"],
]


def begun(communicator: Communicator, recipe: Recipe) -> Any:
    return pieces_of(assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab), values_of(recipe, communicator)))


def trained(communicator: Communicator, recipe: Recipe) -> dict[str, Any]:
    return train(recipe, communicator)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("name", "more"), [("qwen3_moe", ["parallel.expert=2"]), ("olmo3", []), ("qwen2", [])])
def test_every_rank_begins_with_its_part(name: str, more: list[str], layout: list[str], tmp_path: Path) -> None:
    publish(name, tmp_path / "published")
    found = open_model(tmp_path / "published")
    words = [*SMALL, *layout, *(more if "parallel.data=2" in layout else []), f"model.from={tmp_path}/published"]
    recipe = compose(words)
    weights = gather(run("simulated", recipe.world_size(), begun, recipe))
    for part in found.parts:
        expected = Reader(found).fill(part.parameter, part.box.stop, part.box)
        got = torch.from_numpy(weights[f"weight/{part.parameter}"])[part.box.slices((0,) * len(part.box.shape))]
        assert torch.equal(got, expected), part.parameter


def test_a_run_goes_on_from_a_run_and_from_a_checkpoint_with_weights_alone(tmp_path: Path) -> None:
    publish("qwen3_moe", tmp_path / "published")
    first = compose([*SMALL, "train.steps=2", f"model.from={tmp_path}/published", f"run.dir={tmp_path}/first"])
    run("simulated", 1, trained, first)
    export_model(tmp_path / "first", tmp_path / "exported")
    assert (tmp_path / "first/hugging_face/config.json").is_file()
    expected = open_model(tmp_path / "exported")
    for origin in ("first", "first/checkpoints/step-00000002"):
        recipe = compose([*SMALL, f"model.from={tmp_path}/{origin}", f"run.dir={tmp_path}/second", "parallel.data=2"])
        assert recipe.model.hidden == 32
        weights = gather(run("simulated", 2, begun, recipe))
        for part in expected.parts:
            own = torch.from_numpy(weights[f"weight/{part.parameter}"])[part.box.slices((0,) * len(part.box.shape))]
            assert torch.equal(own, Reader(expected).fill(part.parameter, part.box.stop, part.box))
        assert not any(moment.any() for name, moment in weights.items() if not name.startswith("weight/"))


def test_an_import_and_its_origin_train_the_same(tmp_path: Path) -> None:
    publish("llama", tmp_path / "published", torch.float64)
    import_model(tmp_path / "published", tmp_path / "imported")
    words = [*SMALL, "train.dtype=float64", f"model.from={tmp_path}/published"]
    run("simulated", 1, trained, compose([*words, f"run.dir={tmp_path}/straight"]))
    run("simulated", 1, trained, compose([*words, f"run.dir={tmp_path}/imported", "checkpoint.resume=true"]))
    for name in ("straight", "imported"):
        export_model(tmp_path / name, tmp_path / f"exported-{name}")
    one, other = ((tmp_path / f"exported-{name}/model.safetensors").read_bytes() for name in ("straight", "imported"))
    assert one == other


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("model.hidden=64", "model.hidden=64 contradicts model.from="),
        ("model.kv_heads=4", "whose model has model.kv_heads=2; leave model.kv_heads out"),
        ("model.moe.top_k=1", "model.moe.top_k=1 contradicts"),
        ("model.moe.bias_rate=0.1", "model.moe.bias_rate=0.1 contradicts"),
        ("model.window=4", "model.window=4 contradicts"),
    ],
)
def test_a_key_that_contradicts_is_refused(word: str, expected: str, tmp_path: Path) -> None:
    publish("qwen3_moe", tmp_path)
    with pytest.raises(RecipeError, match=expected):
        compose([*SMALL, f"model.from={tmp_path}", word])


def test_a_recipes_own_model_gives_way_and_keys_of_training_stay(tmp_path: Path) -> None:
    publish("qwen3_moe", tmp_path)
    words = ["recipe=tiny_dense", f"model.from={tmp_path}", "model.hidden=32", "model.kv_heads=2", "model.vocab_multiple=64",
             "model.moe.balance_loss=0.5"]  # fmt: skip
    model = compose(words).model
    assert (model.layers, model.vocab_multiple, model.moe.balance_loss, model.moe.experts) == (4, 64, 0.5, 4)


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    refusals = {tmp_path: "holds no checkpoint; give .*, or a model of Hugging Face", tmp_path / "none": "is no directory"}
    for path, expected in refusals.items():
        with pytest.raises(RecipeError, match=expected):
            compose([*SMALL, f"model.from={path}"])


def test_a_run_resumes_without_its_origin(tmp_path: Path) -> None:
    publish("llama", tmp_path / "published")
    begins = compose([*SMALL, f"model.from={tmp_path}/published", f"run.dir={tmp_path}/run"])
    save_recipe(begins)
    (tmp_path / "published").rename(tmp_path / "moved")
    goes_on = [f"run.dir={tmp_path}/run", "checkpoint.resume=true"]
    assert compose(goes_on).model == begins.model
    with pytest.raises(RecipeError, match="is no directory"):
        compose([*goes_on, f"model.from={tmp_path}/published"])


def test_text_is_read_with_the_tokenizer_of_the_model(tmp_path: Path) -> None:
    """Other tokens would mean nothing to it."""
    publish("qwen2", tmp_path / "published")
    words = ["recipe=tiny_dense", f"model.from={tmp_path}/published"]
    assert compose(words).data.tokenizer is None  # the model has none
    tokenizer = tmp_path / "published/tokenizer.json"
    tokenizer.write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": []}')
    assert compose(words).data.tokenizer == str(tokenizer.parent)
    assert compose([*words, "data.tokenizer=other.json"]).data.tokenizer == "other.json"
    assert compose([*words, "data.source=random"]).data.tokenizer is None
    import_model(tmp_path / "published", tmp_path / "imported")
    resumed = compose([f"run.dir={tmp_path}/imported", "checkpoint.resume=true"])
    assert resumed.data.tokenizer == f"{tmp_path}/imported/hugging_face"


def opened(communicator: Communicator, recipes: list[Recipe]) -> str:
    """Returns how a rank is refused."""
    try:
        values_of(recipes[communicator.rank], communicator)
    except (RecipeError, CheckpointError) as error:
        return str(error)
    return ""


def test_nodes_with_different_files_are_refused_on_every_rank(tmp_path: Path) -> None:
    """The recipes stand for nodes, which have other files at the same place."""
    publish("llama", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    shutil.copytree(tmp_path / "one", tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned/model.safetensors")
    save_file(
        {name: tensor + (name.endswith("q_proj.weight")) for name, tensor in tensors.items()}, tmp_path / "tuned/model.safetensors"
    )
    one, copy, tuned = (compose([*SMALL, f"model.from={tmp_path}/{name}"]) for name in ("one", "copy", "tuned"))
    assert run("simulated", 2, opened, [one, copy]) == ["", ""]
    refusals = run("simulated", 3, opened, [one, one, tuned])
    assert all(
        "holds another model on the node of rank 2 than on that of rank 0; give every node the same" in text for text in refusals
    )
    (tmp_path / "copy/model.safetensors").unlink()
    (refused,) = set(run("simulated", 2, opened, [one, copy]))
    assert "copy has neither model.safetensors nor" in refused
    for number in (1, 2):
        run("simulated", 1, trained, compose([*SMALL, f"run.seed={number}", f"run.dir={tmp_path}/run{number}"]))
    runs = [compose([*SMALL, f"model.from={tmp_path}/run{number}"]) for number in (1, 2)]
    assert run("simulated", 2, opened, [runs[0], runs[0]]) == ["", ""]
    assert all("holds another model on the node of rank 1" in text for text in run("simulated", 2, opened, runs))


def test_a_run_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    publish("llama", tmp_path / "published")
    recipe = compose([*SMALL, f"model.from={tmp_path}/published", f"run.dir={tmp_path}/run"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/hugging_face").write_text("in the way")
    with pytest.raises(
        RecipeError, match=r"cannot be copied to .*/run/hugging_face \(File exists\); make room there, or give"
    ) as error:
        keep_origin(recipe)
    assert "\n" not in str(error.value)


def test_a_weight_of_balance_is_refused_for_a_model_without_experts(tmp_path: Path) -> None:
    publish("llama", tmp_path)
    with pytest.raises(
        RecipeError, match=r"model\.moe\.balance_loss=0\.5 has no effect on the model of model\.from=.*; leave it out"
    ):
        compose([*SMALL, f"model.from={tmp_path}", "model.moe.balance_loss=0.5"])


def test_a_tokenizer_that_a_recipe_file_names_is_kept(tmp_path: Path) -> None:
    publish("qwen2", tmp_path / "published")
    (tmp_path / "published/tokenizer.json").write_text("{}")
    (tmp_path / "recipe").mkdir()
    text = "# @package _global_\ndefaults:\n  - /data: stdlib\n  - _self_\ndata:\n  tokenizer: mine.json\n"
    (tmp_path / "recipe/mine.yaml").write_text(text)
    words = [f"hydra.searchpath=[{tmp_path}]", "recipe=mine", f"model.from={tmp_path}/published"]
    assert compose(words).data.tokenizer == "mine.json"
    assert compose([*words, "data.tokenizer=other.json"]).data.tokenizer == "other.json"


def test_text_for_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """A new tokenizer would give the model ids that mean nothing to it."""
    publish("qwen2", tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "imported")
    (tmp_path / "text").write_text("some words")
    np.arange(90, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    starts = {
        rf"model\.from={tmp_path}/published": ["recipe=tiny_dense", f"model.from={tmp_path}/published", f"run.dir={tmp_path}/run"],
        rf"the model imported to {tmp_path}/imported": [f"run.dir={tmp_path}/imported", "checkpoint.resume=true"],
    }
    for model, words in starts.items():
        expected = rf"{model} has no tokenizer\.json, .* data\.source={tmp_path}/text .*; give data\.tokenizer=PATH"
        with pytest.raises(RecipeError, match=expected) as refused:
            check_run_directory(compose([*words, f"data.source={tmp_path}/text"]))
        assert "\n" not in str(refused.value)
        for fine in (f"data.tokenizer={tmp_path}", "data.source=random", f"data.source={tmp_path}/ids.bin"):
            check_run_directory(compose([*words, *([f"data.source={tmp_path}/text"] if "tokenizer" in fine else []), fine]))


def test_a_run_goes_on_without_the_files_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run was moved besides, and so was an imported one."""
    monkeypatch.setitem(published.SIZES, "vocab_size", 300)
    publish("llama", tmp_path / "published")
    shutil.copytree(make_tokenizer(tmp_path), tmp_path / "published", dirs_exist_ok=True)
    import_model(tmp_path / "published", tmp_path / "imported")
    (tmp_path / "text").write_text("".join(TEXTS))
    words = [*SMALL, f"data.source={tmp_path}/text", f"data.cache={tmp_path}/cache", "data.validation_fraction=0.2"]
    begins = compose([*words, f"model.from={tmp_path}/published", f"run.dir={tmp_path}/run"])
    save_recipe(begins)
    run("simulated", 1, trained, begins)
    for gone in ("published", "made", "cache"):
        shutil.rmtree(tmp_path / gone)
    for name in ("run", "imported"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
        resumed = compose([*words[1:], f"run.dir={tmp_path}/moved-{name}", "checkpoint.resume=true", "train.steps=2"])
        own = tmp_path / f"moved-{name}"
        assert resumed.data.tokenizer == str(own if name == "run" else own / "hugging_face")
        check(resumed, 1)
        check_run_directory(resumed)
        assert run("simulated", 1, trained, resumed)[0]["step"] == 2


def test_a_run_that_has_not_trained_yet_takes_the_tokenizer_that_it_was_given(tmp_path: Path) -> None:
    """Its directory may hold that of a start before, which was given another."""
    folder = RunDirectory(tmp_path / "run")
    given = make_tokenizer(tmp_path)
    assert kept_tokenizer(folder, None) is None
    assert kept_tokenizer(folder, str(given)) == str(given)
    shutil.copytree(given, folder.path)
    assert kept_tokenizer(folder, str(given)) == str(given)
    folder.metrics.write_text("{}\n")
    assert kept_tokenizer(folder, str(given)) == str(folder.path)
    assert kept_tokenizer(folder, None) is None
    folder.tokenizer.unlink()
    assert kept_tokenizer(folder, str(given)) == str(given)
    assert kept_tokenizer(folder, "gone") == "gone"
