"""A directory that does not hold a model as the decoder knows it is refused with what is wrong in it, all of it by name."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagualu.comm.errors import RecipeError
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.hugging_face.config import write_config
from bagualu.trainer.models.hugging_face.directory import open_model
from tests.trainer.models.hugging_face.published import publish


def changed(**fields: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text()) | fields
        (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "left out"}))

    return change


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return rewrite


def cut(left_out: int) -> Callable[[Path], None]:
    def shorten(path: Path) -> None:
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[: len(data) - left_out if left_out > 0 else 100])

    return shorten


def tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 96}}, "added_tokens": []}))


def headed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes the header of the file; what `change` returns, if anything, takes the header's place."""

    def rewrite(path: Path) -> None:
        data = (path / "model.safetensors").read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        text = json.dumps(change(header) or header).encode()
        (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return rewrite


def about(**fields: Any) -> Callable[[Path], None]:
    return headed(lambda header: header[NORM].update(fields))


def as_header(text: bytes) -> Callable[[Path], None]:
    return lambda path: (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


NORM, OUTPUT = "model.norm.weight", "model.layers.1.self_attn.o_proj.weight"
CASES = {
    "architecture": (changed(model_type="gemma3"), "model_type=gemma3, which the decoder is not; there are llama, mistral"),
    "class": (changed(architectures=["LlamaForSequenceClassification"]), "only LlamaForCausalLM"),
    "field": (changed(logit_scale=2.0, other=1), "has logit_scale=2.0, other=1, which the decoder does not know"),
    "value": (changed(hidden_act="gelu"), "has hidden_act=gelu, but the decoder has only hidden_act=silu"),
    "quantised": (changed(quantization_config={"bits": 4}), "quantization_config="),
    "scaling": (changed(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "has rope_type=dynamic"),
    "field of a scaling": (changed(rope_parameters={"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "truncate": False}),
                           "has mscale=0.7, truncate=False for rope_type=yarn, which the decoder does not know"),
    "scaling without its factor": (changed(rope_parameters={"rope_type": "linear"}), "has rope_type=linear without factor"),
    "scaling of a wrong kind": (changed(rope_scaling="yarn"), "has a value of a wrong kind"),
    "partly rotated": (changed(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "over whole heads"),
    "contradiction": (changed(rope_theta=7.0), "more than once, and not the same"),
    "biases": (changed(attention_bias=True), "attention_bias=True and mlp_bias=False"),
    "lacking field": (changed(hidden_size="left out"), "lacks hidden_size"),
    "invalid": (changed(num_key_value_heads=3), "must divide model.heads=4"),
    "missing": (with_tensors(lambda t: (t.pop(NORM), t.pop(OUTPUT))), f"it lacks {OUTPUT}, {NORM}; give"),
    "surplus": (with_tensors(lambda t: t.update(a=torch.zeros(2), b=torch.zeros(2))), "it has besides a, b; give"),
    "both": (with_tensors(lambda t: t.update({"b": t.pop(NORM)})), f"it lacks {NORM} and has besides b; give"),
    "shape": (with_tensors(lambda t: t.update({NORM: torch.zeros(31), OUTPUT: torch.zeros(32, 8)})),
              f"{NORM} [31] instead of [32]"),
    "integers": (with_tensors(lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)})), "has weights of I8"),
    "cut off": (cut(10), "model.safetensors is cut off: it has"),
    "cut off in the header": (cut(0), "is cut off within its header"),
    "header of text": (as_header(b"not JSON"), "model.safetensors has no header of a safetensors file (Expecting value"),
    "header of bytes": (as_header(bytes([255] * 50)), "model.safetensors has no header of a safetensors file ('utf-8' codec"),
    "header of brackets": (as_header(b"[" * 100_000), "model.safetensors has no header of a safetensors file ("),
    "header of a list": (headed(lambda header: [header]), "model.safetensors has no header of a safetensors file, but [{"),
    "empty file": (lambda path: (path / "model.safetensors").write_bytes(b""), "is cut off within its header, at 0 bytes"),
    "tensor of text": (headed(lambda header: header.update({NORM: "F32"})),
                       f'tensor {NORM} has no dtype, shape and place, but "F32"'),
    "dtype of numbers": (about(dtype=[1]), f"tensor {NORM} has no dtype, shape and place, but {{"),
    "negative shape": (about(shape=[-32]), f"tensor {NORM} has no dtype, shape and place, but {{"),
    "places of text": (about(data_offsets=["0", "128"]), f"tensor {NORM} has no dtype, shape and place, but {{"),
    "one place": (about(data_offsets=[0]), f"tensor {NORM} has no dtype, shape and place, but {{"),
    "places beyond the file": (about(data_offsets=[10**9, 10**9 + 128]), "is cut off: it has"),
    "places backwards": (about(data_offsets=[128, 0]), f"tensor {NORM} of F32 [32] lies at bytes 128 to 0 of the data"),
    "places of another size": (about(data_offsets=[0, 64]), f"tensor {NORM} of F32 [32] lies at bytes 0 to 64 of the data"),
    "index of a list": (lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'),
                        "model.safetensors.index.json has no weight_map with the names of files"),
    "positions": (changed(max_position_embeddings="many"), "max_position_embeddings=many, which is no number of positions"),
    "odd tokenizer": (lambda path: (path / "tokenizer.json").write_text('{"model": [1]}'), "tokenizer.json is no tokenizer ("),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "no configuration": (lambda path: (path / "config.json").unlink(), "config.json cannot be read (No such file"),
    "no JSON": (lambda path: (path / "config.json").write_text("{"), "config.json is not JSON"),
    "tokenizer": (tokenizer, "tokenizer.json has ids up to 96, but the model has vocab_size=96"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_in_one_line(case: str, tmp_path: Path) -> None:
    publish("llama", tmp_path)
    spoil, expected = CASES[case]
    open_model(tmp_path)
    spoil(tmp_path)
    with pytest.raises(RecipeError) as refused:
        open_model(tmp_path)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_shards_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    publish("llama", tmp_path, max_shard_size="30KB")
    gone = min(tmp_path.glob("model-*.safetensors"))
    gone.unlink()
    with pytest.raises(RecipeError, match=f"lacks {gone.name}, which"):
        open_model(tmp_path)


def test_a_copy_of_a_tied_head_and_angles_of_old_files_are_left(tmp_path: Path) -> None:
    publish("qwen2", tmp_path)
    with_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone(),
                                     "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))(tmp_path)  # fmt: skip
    assert "lm_head.weight" not in open_model(tmp_path).tensors


OF_NO_FAMILY: list[dict[str, Any]] = [
    {"norm": "layer"},
    {"activation": "gelu"},
    {"positions": "none"},
    {"bias": "attention", "qk_norm": True},
    {"embedding_norm": True},
    {"qk_norm": True, "norm_position": "after"},
]


@pytest.mark.parametrize("changes", OF_NO_FAMILY, ids=str)
def test_a_model_of_no_family_is_not_exported(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="describes this model: model"):
        write_config(ModelConfig(**changes), "float32", {}, 64)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(("sliding", "full"), [(YARN, PLAIN), (PLAIN | {"rope_theta": 1e6}, YARN), (YARN, YARN | {"factor": 8.0})])
def test_angles_that_differ_in_other_ways_than_olmo3s_are_refused(sliding: Any, full: Any, tmp_path: Path) -> None:
    publish("olmo3", tmp_path)
    changed(rope_parameters={"sliding_attention": PLAIN, "full_attention": YARN})(tmp_path)
    assert open_model(tmp_path).description.model.rope_scaled_layers == "full"
    changed(rope_parameters={"sliding_attention": sliding, "full_attention": full})(tmp_path)
    with pytest.raises(RecipeError, match="gives layers with a window other angles of positions than layers without"):
        open_model(tmp_path)


def test_angles_are_written_by_their_old_names_too() -> None:
    config = write_config(ModelConfig(rope_theta=5e5, rope_scaling="llama3"), "bfloat16", {}, 64)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, scaling)
    assert config["rope_parameters"] == {"rope_theta": 5e5, **scaling}
    assert (config["torch_dtype"], config["dtype"]) == ("bfloat16", "bfloat16")


def test_yarn_is_written_so_that_every_reader_computes_the_same() -> None:
    """transformers 4.57 scales an OLMo 3 in layers without a window only, so a model that is scaled in all layers is not one."""
    yarn = ModelConfig(rope_scaling="yarn", rope_factor=4.0, rope_original_positions=1000)
    config = write_config(yarn, "bfloat16", {}, 64)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000, "beta_fast": 32.0, "beta_slow": 1.0,
               "attention_factor": 0.1 * math.log(4.0) + 1}  # fmt: skip
    assert (config["rope_scaling"], config["rope_parameters"]) == (scaling, {"rope_theta": 1e4, **scaling})
    olmo = {"norm_position": "after", "qk_norm": True, "qk_norm_over": "all", "window": 8, "full_attention_every": 2}
    assert write_config(replace(yarn, **olmo, rope_scaled_layers="full"), "bfloat16", {}, 64)["rope_parameters"] == {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": {"rope_theta": 1e4, **scaling}
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"model\.rope_scaling=yarn"):
        write_config(replace(yarn, **olmo), "bfloat16", {}, 64)
