"""An export carries the tokenizer of the run's text, and transformers reads the same ids with it."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.trainer import run as whole_run
from bagualu.trainer.conversion.export_model import export_model
from bagualu.trainer.conversion.import_model import import_model
from bagualu.trainer.data.tokenizer import load_tokenizer
from bagualu.trainer.recipe.compose import compose, save_recipe
from bagualu.trainer.recipe.config import Recipe
from tests.harness import run
from tests.parity import small_recipe
from tests.texts import FURNACE
from tests.trainer.data.test_chat import TEMPLATE, make
from tests.trainer.models.hugging_face.published import publish

TEXTS = ["def main() -> None:\n\tprint('naïve 八卦炉')\r\n", "  two  spaces", "<|endoffile|>after", "<|user|>why?<|end|>\n"]


def trained(communicator: Communicator, recipe: Recipe) -> None:
    whole_run.train(recipe, communicator)


def recipe_in(folder: Path, **changes: object) -> Recipe:
    (folder / "text").mkdir()
    shutil.copy(FURNACE, folder / "text")
    fixed = {"train__steps": 1, "train__validation_sequences": 0, "model__vocab": 300, "log__progress": "off"}
    folders = {"run__dir": folder / "run", "data__source": folder / "text", "data__cache": folder / "cache"}
    recipe = small_recipe(**fixed, **{key: str(path) for key, path in folders.items()}, **changes)
    save_recipe(recipe)
    return recipe


def assert_same_ids(run_dir: Path, exported: Path) -> None:
    ours, theirs = load_tokenizer(run_dir / "tokenizer.json", special_tokens=True), AutoTokenizer.from_pretrained(exported)
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_a_tokenizer_that_was_trained_here_goes_with_the_model(tmp_path: Path) -> None:
    run("simulated", 1, trained, recipe_in(tmp_path))
    export_model(tmp_path / "run", tmp_path / "exported")
    assert_same_ids(tmp_path / "run", tmp_path / "exported")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert (theirs.eos_token, theirs.eos_token_id, theirs.model_max_length) == ("<|endoffile|>", 0, 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (0, 0)


def test_a_tokenizer_that_was_given_goes_with_its_chat_template(tmp_path: Path) -> None:
    made = make(tmp_path, in_a_file=True)
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2]}))
    run("simulated", 1, trained, recipe_in(tmp_path, data__tokenizer=str(made)))
    export_model(tmp_path / "run", tmp_path / "exported")
    assert_same_ids(tmp_path / "run", tmp_path / "exported")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert (theirs.eos_token, theirs.eos_token_id, theirs.chat_template) == ("<|end|>", 3, TEMPLATE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert model.generation_config.eos_token_id == [3, 2], "all tokens that end a text"
    assert json.loads((tmp_path / "exported/config.json").read_text())["eos_token_id"] == 3


def test_another_tokenizer_takes_the_place_of_that_of_the_model_of_hugging_face(tmp_path: Path) -> None:
    """Its ids would be other text. The same tokenizer keeps all that came with it."""
    publish("llama", tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "imported")
    (tmp_path / "imported/hugging_face/special_tokens_map.json").write_text("{}")
    shutil.copy(make(tmp_path) / "tokenizer.json", tmp_path / "imported/hugging_face")
    shutil.copy(tmp_path / "made/tokenizer.json", tmp_path / "imported")
    export_model(tmp_path / "imported", tmp_path / "same")
    assert (tmp_path / "same/special_tokens_map.json").is_file()
    assert json.loads((tmp_path / "same/config.json").read_text())["eos_token_id"] == 2, "as the model of Hugging Face has it"
    other = load_tokenizer(tmp_path / "made/tokenizer.json")
    other.add_special_tokens(["<|endoftext|>"])
    other.save(str(tmp_path / "imported/tokenizer.json"))
    export_model(tmp_path / "imported", tmp_path / "other")
    assert not (tmp_path / "other/special_tokens_map.json").exists()
    assert (tmp_path / "other/tokenizer.json").read_bytes() == (tmp_path / "imported/tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "other/config.json").read_text())["eos_token_id"] == other.token_to_id("<|endoftext|>")
    (tmp_path / "imported/tokenizer.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"imported/tokenizer\.json cannot be read \(.*\); put it back, or remove it"):
        export_model(tmp_path / "imported", tmp_path / "none")


def test_sequences_of_an_import_are_as_long_as_its_positions(tmp_path: Path) -> None:
    publish("qwen2", tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "imported")
    assert compose([f"run.dir={tmp_path}/imported", "checkpoint.resume=true"]).data.sequence_length == 64
