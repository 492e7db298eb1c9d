"""The decoder computes what transformers computes, for every family, from files in every form that there is."""

import json
import os
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagualu.comm.errors import RecipeError
from bagualu.parallel.boxes import Box
from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.models.hugging_face.config import read_config, write_config
from bagualu.trainer.models.hugging_face.directory import open_model
from bagualu.trainer.models.hugging_face.read import Reader
from tests.trainer.models.hugging_face.published import NAMES, configs, logits, publish, tokens


def decoder(path: Path, dtype: torch.dtype) -> Decoder:
    found = open_model(path)
    model = Decoder(found.description.model, [LayerSlice.of_layers(range(found.description.model.layers))]).to(dtype)
    reader, filled = Reader(found), {}
    for name, parameter in model.named_parameters():
        whole = Box((0,) * parameter.dim(), tuple(parameter.shape))
        filled[name] = reader.fill(name, whole.shape, whole).to(dtype)
    model.load_state_dict(filled, strict=False)
    return model


def own_logits(path: Path, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        return decoder(path, dtype)(tokens())[0]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    publish(name, tmp_path)
    torch.testing.assert_close(own_logits(tmp_path, torch.float32), logits(tmp_path, torch.float32), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own_logits(tmp_path, torch.float64), logits(tmp_path, torch.float64), rtol=1e-9, atol=1e-9)


def as_old(path: Path) -> None:
    """Makes config.json as transformers 4 wrote it."""
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    rope = rope.get("full_attention", rope)
    config["rope_theta"] = rope["rope_theta"]
    scaling = {("type" if key == "rope_type" else key): value for key, value in rope.items() if key != "rope_theta"}
    config["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    config["torch_dtype"] = config.pop("dtype", "float32")
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["llama", "llama_linear", "qwen2_yarn", "qwen3", "qwen3_yarn", "olmo3", "olmo3_yarn"])
def test_old_names_of_angles_are_read(name: str, tmp_path: Path) -> None:
    publish(name, tmp_path)
    new = open_model(tmp_path).description.model
    as_old(tmp_path)
    assert open_model(tmp_path).description.model == new


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_read(name: str, tmp_path: Path) -> None:
    publish(name, tmp_path)
    expected = own_logits(tmp_path, torch.float32)
    tensors = {key.replace("block_sparse_moe", "mlp"): value for key, value in load_file(tmp_path / "model.safetensors").items()}
    names = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (torch.stack([tensors.pop(f"{prefix}.{e}.{one}.weight") for e in range(4)]) for one in names)
        tensors[f"{prefix}.gate_up_proj"], tensors[f"{prefix}.down_proj"] = torch.cat((gate, up), 1), down
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(own_logits(tmp_path, torch.float32), expected)


def test_several_files_are_read(tmp_path: Path) -> None:
    for folder, size in (("one", "1GB"), ("several", "10KB")):
        publish("qwen3_moe", tmp_path / folder, max_shard_size=size)
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 3
    assert torch.equal(*(own_logits(tmp_path / folder, torch.float32) for folder in ("one", "several")))


@pytest.mark.parametrize("name", NAMES)
def test_every_box_is_read_from_its_place(name: str, tmp_path: Path) -> None:
    """Halves along every dim, as tensor and expert ranks read them, in the dtype of the files and in another."""
    publish(name, tmp_path, torch.bfloat16)
    found = open_model(tmp_path)
    reader = Reader(found)
    for parameter, shape in parameter_shapes(found.description.model).items():
        whole = reader.fill(parameter, shape, Box((0,) * len(shape), shape))
        assert whole.dtype == torch.bfloat16
        for dim, size in enumerate(shape):
            half = size // 2
            box = Box(tuple(half if d == dim else 0 for d in range(len(shape))),
                      tuple(size - half if d == dim else s for d, s in enumerate(shape)))  # fmt: skip
            expected = whole[box.slices((0,) * len(shape))]
            assert torch.equal(reader.fill(parameter, shape, box), expected)
            wide = torch.empty(box.shape)
            reader.read(parameter, box, wide)
            assert torch.equal(wide, expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_the_bytes_of_a_box_are_read(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the columns of a matrix, which tensor ranks hold of the output of attention and of a feed-forward."""
    publish("qwen3_moe", tmp_path, torch.bfloat16)
    reader, count = Reader(open_model(tmp_path)), 0
    plain = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], at: int) -> int:
        nonlocal count
        count += (size := plain(descriptor, buffers, at))
        return size

    monkeypatch.setattr(os, "preadv", counting)
    for parameter, shape in parameter_shapes(open_model(tmp_path).description.model).items():
        for dim, size in enumerate(shape):
            offset, extent = [0] * len(shape), list(shape)
            offset[dim], extent[dim] = size // 4, size // 2
            count = 0
            reader.read(parameter, Box(tuple(offset), tuple(extent)), torch.empty(extent, dtype=dtype))
            assert count == 2 * prod(extent), (parameter, dim)


def test_what_the_model_does_not_have_is_not_made_up(tmp_path: Path) -> None:
    publish("qwen2", tmp_path)
    with pytest.raises(RecipeError, match=r"holds nothing for layers\.0\.feed_forward\.router\.bias"):
        Reader(open_model(tmp_path)).fill("layers.0.feed_forward.router.bias", (4,), Box((0,), (4,)))


@pytest.mark.parametrize("name", NAMES)
def test_a_written_configuration_is_that_of_the_same_model(name: str) -> None:
    description = read_config(saved(name), "config.json")
    written = write_config(description.model, "bfloat16", {}, 64)
    again = read_config(written, "config.json")
    assert again.model == description.model
    assert again.family == description.family


def saved(name: str) -> dict[str, object]:
    config = configs()[name]
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    return dict(json.loads(config.to_json_string()))
