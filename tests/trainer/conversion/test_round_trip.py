"""Models of Hugging Face become runs and runs become such models, with every bit, and with training on any layout in between."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.trainer.conversion import export_model as exporting
from bagualu.trainer.conversion.export_model import export_model
from bagualu.trainer.conversion.import_model import import_model
from bagualu.trainer.models.hugging_face.directory import open_model
from bagualu.trainer.recipe.compose import load_recipe
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.preflight import check_run_directory
from bagualu.trainer.run import train
from tests.harness import run
from tests.trainer.models.hugging_face.published import NAMES, logits, publish
from tests.trainer.models.hugging_face.test_parity import own_logits


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_what_is_imported_and_exported_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    publish(name, tmp_path / "published", torch.bfloat16)
    result = import_model(tmp_path / "published", tmp_path / "run")
    assert result["parameters"] == sum(tensor.numel() for tensor in tensors(tmp_path / "published").values())
    assert verify(Path(result["path"])) == []
    recipe = load_recipe(tmp_path / "run/config.yaml")
    assert (recipe.model, recipe.train.dtype) == (open_model(tmp_path / "published").description.model, "bfloat16")
    export_model(tmp_path / "run", tmp_path / "exported")
    assert_equal(tmp_path / "published", tmp_path / "exported")
    assert torch.equal(logits(tmp_path / "published", torch.float32), logits(tmp_path / "exported", torch.float32))
    assert open_model(tmp_path / "exported").description.model == recipe.model


def test_master_weights_are_exported_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    publish("qwen3_moe", tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "exported", "bfloat16")
    for name, tensor in tensors(tmp_path / "published").items():
        assert torch.equal(tensors(tmp_path / "exported")[name], tensor.bfloat16()), name


def test_large_models_are_exported_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "SHARD_BYTES", 30_000)
    publish("mixtral", tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "exported")
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 3
    assert_equal(tmp_path / "published", tmp_path / "exported")
    assert torch.equal(logits(tmp_path / "published", torch.float32), logits(tmp_path / "exported", torch.float32))


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"data": 2, "tensor": 2, "sequence": True},
    {"data": 2, "pipeline": 2, "zero": 2},
    {"data": 4, "zero": 3},
]


def trained(communicator: Communicator, recipe: Recipe) -> dict[str, Any]:
    return train(recipe, communicator)


FEW = ("llama", "olmo3", "qwen3_moe")
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in FEW]


@pytest.mark.parametrize("name", [*FEW, *OTHERS])
def test_a_step_on_any_layout_gives_the_same_model(name: str, tmp_path: Path) -> None:
    """And transformers computes with it what the decoder does."""
    publish(name, tmp_path / "published", torch.float64)
    found = []
    for number, layout in enumerate(LAYOUTS):
        folder = tmp_path / f"run{number}"
        import_model(tmp_path / "published", folder)
        recipe = load_recipe(folder / "config.yaml")
        recipe.data = replace(recipe.data, source="random", sequence_length=8, global_batch=8)
        recipe.train = replace(recipe.train, steps=1, validation_sequences=0)
        recipe.optim = replace(recipe.optim, lr=1e-2, warmup_steps=1)
        recipe.parallel = replace(recipe.parallel, **layout)
        recipe.checkpoint = replace(recipe.checkpoint, resume=True, every=1)
        recipe.log = replace(recipe.log, progress="off")
        run("simulated", recipe.world_size(), trained, recipe)
        export_model(folder, tmp_path / f"exported{number}")
        found.append(logits(tmp_path / f"exported{number}", torch.float64))
    assert (found[0] - logits(tmp_path / "published", torch.float64)).abs().max() > 1e-3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own_logits(tmp_path / "exported0", torch.float64), found[0], rtol=1e-9, atol=1e-9)


def test_an_imported_run_takes_any_data_but_no_other_model(tmp_path: Path) -> None:
    publish("llama", tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "run")
    recipe = load_recipe(tmp_path / "run/config.yaml")
    recipe.checkpoint.resume = True
    recipe.data = replace(recipe.data, source="random", sequence_length=16, global_batch=4)
    recipe.run.seed = 7
    check_run_directory(recipe)
    recipe.model = replace(recipe.model, ffn=64)
    with pytest.raises(RecipeError, match=r"has model\.ffn=48, not 64"):
        check_run_directory(recipe)
