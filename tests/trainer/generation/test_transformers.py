"""Greedy tokens are those that transformers generates with the same weights, for prompts of unequal length in one batch."""

from pathlib import Path

import pytest
import torch

from bagualu.comm.group import Communicator
from bagualu.parallel.layout import Layout
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.trainer.generation.generate import generate
from bagualu.trainer.generation.request import Sampling
from bagualu.trainer.generation.stages import Stages
from bagualu.trainer.generation.text import GrowingText
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.models.hugging_face.directory import open_model
from tests.harness import run
from tests.parity import small_recipe
from tests.trainer.models.hugging_face.published import NAMES, InFloat64, publish
from tests.trainer.models.hugging_face.test_parity import decoder

transformers = pytest.importorskip("transformers")

PROMPTS = [[5, 17, 40, 3, 3, 9, 60, 2, 2], [1], [33, 34, 35]]
COUNT = 70
"""Longer than a cache before it grows."""
FEWER = 24
"""More than the windows of the families' small models."""
ATTENTION = {"query": "q", "key": "k", "value": "v", "output": "o"}
OF_A_LAYER = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    **{f"attention.{name}": f"self_attn.{letter}_proj" for name, letter in ATTENTION.items()},
    **{f"feed_forward.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
OTHERS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


def a_llama() -> torch.nn.Module:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, rms_norm_eps=1e-5, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model: torch.nn.Module = transformers.LlamaForCausalLM(config).double().eval()
    return model


def theirs(model: torch.nn.Module, count: int = COUNT, **options: float) -> list[list[int]]:
    longest = max(map(len, PROMPTS))
    rows = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    tokens = model.generate(rows, attention_mask=mask, max_new_tokens=count, do_sample=False, **options)  # type: ignore[operator]
    return [row.tolist() for row in tokens[:, longest:]]


def ours(communicator: Communicator, model: torch.nn.Module, sampling: Sampling) -> list[list[int]]:
    recipe = small_recipe(model__layers=3, model__hidden=32, model__heads=4, model__kv_heads=2, model__ffn=48, model__vocab=64)
    decoder = Decoder(recipe.model, [LayerSlice.of_layers(range(3))]).double()
    weights = dict(model.named_parameters())
    for name, parameter in decoder.named_parameters():
        module, _, kind = name.rpartition(".")
        layer = module.split(".", 2)
        of_layer = layer[0] == "layers"
        same = f"model.layers.{layer[1]}.{OF_A_LAYER[layer[2]]}" if of_layer else OTHERS[module]
        parameter.data.copy_(weights[f"{same}.{kind}"])
    texts = [GrowingText(None, prompt, COUNT) for prompt in PROMPTS]
    generate(Stages(recipe, Mesh.build(Layout(), communicator), decoder, decoder), PROMPTS, texts, sampling)
    return [text.tokens for text in texts]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_those_of_transformers(penalty: float) -> None:
    model = a_llama()
    sampling = Sampling(max_new_tokens=COUNT, repetition_penalty=penalty)
    (found,) = run("simulated", 1, ours, model, sampling)
    wanted = theirs(model, repetition_penalty=penalty)
    rows = len(PROMPTS) if penalty == 1 else 1  # transformers penalises padding too, which the longest prompt has none of
    assert found[:rows] == wanted[:rows]


def theirs_from(path: Path) -> list[list[int]]:
    with InFloat64():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        return theirs(model, FEWER)


def ours_from(communicator: Communicator, path: Path) -> list[list[int]]:
    model = decoder(path, torch.float64)
    recipe = small_recipe()
    recipe.model = open_model(path).description.model
    texts = [GrowingText(None, prompt, FEWER) for prompt in PROMPTS]
    stages = Stages(recipe, Mesh.build(Layout(), communicator), model, model)
    generate(stages, PROMPTS, texts, Sampling(max_new_tokens=FEWER))
    return [text.tokens for text in texts]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_of_every_family_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    publish(name, tmp_path)
    (found,) = run("simulated", 1, ours_from, tmp_path)
    assert found == theirs_from(tmp_path)
    assert len({token for tokens in found for token in tokens}) > 5, "the tokens vary"
