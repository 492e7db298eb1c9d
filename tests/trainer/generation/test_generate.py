"""The same tokens in every layout, from the same checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.generation.generate import generate
from bagualu.trainer.generation.request import GenerateRequest, Sampling
from bagualu.trainer.generation.stages import load_stages
from bagualu.trainer.generation.text import GrowingText
from bagualu.trainer.generation.worker import generate_on_ranks
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import small_recipe
from tests.trainer.states import save_state

PROMPTS = [[5, 17, 40, 3, 3, 9, 60], [1], [33, 34, 35]]
MODELS: dict[str, dict[str, object]] = {
    "rotary": {"model__kv_heads": 2, "model__vocab": 61},
    "alibi, tied": {"model__positions": "alibi", "model__tie_embeddings": True},
    "learned": {"model__positions": "learned", "model__max_positions": 32, "model__bias": "all", "model__norm": "layer"},
    "mixture": {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__every": 2},
}
LAYOUTS: dict[str, list[dict[str, int]]] = {
    "rotary": [{"tensor": 2}, {"pipeline": 2}, {"data": 2}, {"tensor": 2, "pipeline": 3}],
    "alibi, tied": [{"tensor": 4}, {"pipeline": 4}],
    "learned": [{"tensor": 2, "sequence": True}, {"pipeline": 2, "tensor": 2}],
    "mixture": [{"data": 2, "expert": 2}, {"data": 4, "expert": 4}, {"tensor": 2, "sequence": True, "data": 2, "expert": 2}],
}


def recipe_for(folder: Path, model: str, **layout: object) -> Recipe:
    keys = {f"parallel__{key}": value for key, value in layout.items()}
    return small_recipe(run__dir=str(folder), data__global_batch=8, **MODELS[model], **keys)


def saved(communicator: Communicator, recipe: Recipe) -> str:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    train_step(state, 0)
    return str(save_state(state, 1))


def generated(communicator: Communicator, recipe: Recipe) -> list[list[int]]:
    return [sample["tokens"] for sample in generate_on_ranks(recipe, communicator, lambda: False)["samples"]]


def ask(folder: Path, checkpoint: str, **options: object) -> None:
    prompts, sampling = tuple(map(tuple, PROMPTS)), Sampling(**{"max_new_tokens": 9, **options})  # type: ignore[arg-type]
    GenerateRequest(checkpoint, None, (None,) * len(PROMPTS), prompts, sampling, stream=False).save(folder)


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    folder = tmp_path_factory.mktemp("run")
    (checkpoint,) = set(run("simulated", 2, saved, recipe_for(folder, request.param, pipeline=2)))
    return request.param, folder, checkpoint


def test_every_layout_gives_the_tokens_of_one_process(trained: tuple[str, Path, str]) -> None:
    model, folder, checkpoint = trained
    for options in ({}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3}):
        ask(folder, checkpoint, **options)
        (alone,) = run("simulated", 1, generated, recipe_for(folder, model))
        assert [len(tokens) for tokens in alone] == [9, 9, 9]
        assert len({tuple(tokens) for tokens in alone}) == 3
        for layout in LAYOUTS[model]:
            recipe = recipe_for(folder, model, **layout)
            assert run("simulated", recipe.world_size(), generated, recipe) == [alone] * recipe.world_size(), layout


def without_a_cache(communicator: Communicator, recipe: Recipe, checkpoint: str, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each from a pass over all tokens before it."""
    model, tokens = load_stages(recipe, communicator, Path(checkpoint)).model, list(prompt)
    assert isinstance(model, Decoder)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0][0, -1, : recipe.model.vocab].argmax()))
    return tokens[len(prompt) :]


def test_the_tokens_are_those_without_a_cache(trained: tuple[str, Path, str]) -> None:
    model, folder, checkpoint = trained
    ask(folder, checkpoint)
    recipe = recipe_for(folder, model)
    (tokens,) = run("simulated", 1, generated, recipe)
    assert [tokens] == [[run("simulated", 1, without_a_cache, recipe, checkpoint, prompt, 9)[0] for prompt in PROMPTS]]


def stopped_on_one_rank(communicator: Communicator, recipe: Recipe, checkpoint: str) -> tuple[bool, int]:
    stages = load_stages(recipe, communicator, Path(checkpoint))
    text, asked = GrowingText(None, PROMPTS[0], 9), []

    def stop() -> bool:
        asked.append(communicator.rank == 1)
        return communicator.rank == 1 and len(asked) == 3

    return generate(stages, PROMPTS[:1], [text], Sampling(max_new_tokens=9), stop=stop), len(text.tokens)


def test_a_request_to_stop_on_one_rank_ends_it_on_all(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "rotary", pipeline=2)
    (checkpoint, _) = run("simulated", 2, saved, recipe)
    assert run("simulated", 2, stopped_on_one_rank, recipe, checkpoint) == [(False, 3)] * 2


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "rotary")
    (checkpoint,) = run("simulated", 1, saved, recipe)
    ask(tmp_path, checkpoint)
    recipe.model.rope_theta = 500.0
    with pytest.raises(RecipeError, match=r"saved with model\.rope_theta=10000\.0 but config\.yaml of its run has 500\.0"):
        run("simulated", 1, generated, recipe)


def test_a_request_is_read_as_it_was_saved(tmp_path: Path) -> None:
    request = GenerateRequest("c", "t", ("a\n", None), ((1,), (2, 3)), Sampling(stop=("x", "ü"), seed=2**63), stream=True)
    request.save(tmp_path)
    assert GenerateRequest.load(tmp_path) == request
    assert request.shown_prompts == ["a\n", "2 3"]
    json.loads((tmp_path / "request.json").read_text())
