"""How fast tokens are generated, against transformers on the same weights, dtype and threads.

    python tests/bench/generate.py --prompts 1 8 --json out.json

The two take turns: A B A B. Each continues the same prompts of random tokens by the same number of tokens, always the most probable
ones; the tokens must be equal in float32 and float64. Medians of the rounds; the prompts are part of the time.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers

from bagualu.comm import simulated
from bagualu.comm.group import Communicator
from bagualu.parallel.layout import Layout
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.trainer.generation.generate import generate
from bagualu.trainer.generation.request import Sampling
from bagualu.trainer.generation.stages import Stages
from bagualu.trainer.generation.text import GrowingText
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe

ATTENTION = {"query": "q", "key": "k", "value": "v", "output": "o"}
Tokens = list[list[int]]


def a_llama(recipe: Recipe, dtype: torch.dtype) -> Any:
    """The recipe's model as one of transformers, with random weights."""
    model = recipe.model
    config = transformers.LlamaConfig(
        vocab_size=model.vocab, hidden_size=model.hidden, intermediate_size=model.ffn, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.key_value_heads, rms_norm_eps=model.norm_epsilon,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def copied(recipe: Recipe, llama: Any, dtype: torch.dtype) -> Decoder:
    """The recipe's model with the weights of `llama`."""
    decoder = Decoder(recipe.model, [LayerSlice.of_layers(range(recipe.model.layers))]).to(dtype)
    theirs = dict(llama.named_parameters())
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
    for index in range(recipe.model.layers):
        here, there = f"layers.{index}", f"model.layers.{index}"
        names[f"{here}.attention_norm.weight"] = f"{there}.input_layernorm.weight"
        names[f"{here}.feed_forward_norm.weight"] = f"{there}.post_attention_layernorm.weight"
        names |= {f"{here}.attention.{a}.weight": f"{there}.self_attn.{b}_proj.weight" for a, b in ATTENTION.items()}
        names |= {f"{here}.feed_forward.{a}.weight": f"{there}.mlp.{a}_proj.weight" for a in ("gate", "up", "down")}
    for name, parameter in decoder.named_parameters():
        parameter.data.copy_(theirs[names[name]])
    return decoder


def with_bagualu(stages: Stages, prompts: Tokens, count: int) -> Tokens:
    texts = [GrowingText(None, prompt, count) for prompt in prompts]
    generate(stages, prompts, texts, Sampling(max_new_tokens=count))
    return [text.tokens for text in texts]


def with_transformers(llama: Any, prompts: Tokens, count: int) -> Tokens:
    rows = torch.tensor(prompts)
    tokens = llama.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=count, do_sample=False)
    return [row.tolist() for row in tokens[:, rows.shape[1] :]]


def measure(communicator: Communicator, given: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    recipe = compose([f"recipe={given.recipe}", f"train.dtype={given.dtype}", "comm.backend=simulated"])
    recipe = replace(recipe, model=replace(recipe.model, tie_embeddings=False))
    dtype = getattr(torch, given.dtype)
    llama = a_llama(recipe, dtype)
    decoder = copied(recipe, llama, dtype)
    stages = Stages(recipe, Mesh.build(Layout(), communicator), decoder, decoder)
    stages.freeze()
    rows = []
    for number in given.prompts:
        prompts = torch.randint(
            recipe.model.vocab, (number, given.prompt_tokens), generator=torch.Generator().manual_seed(1)
        ).tolist()
        ways: dict[str, Callable[[], Tokens]] = {
            "bagualu": lambda prompts=prompts: with_bagualu(stages, prompts, given.new_tokens),  # type: ignore[misc]
            "transformers": lambda prompts=prompts: with_transformers(llama, prompts, given.new_tokens),  # type: ignore[misc]
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        tokens: dict[str, Tokens] = {}
        for turn in range(1 + given.rounds):  # the first is to warm up
            for name, way in ways.items():
                started = time.perf_counter()
                tokens[name] = way()
                if turn:
                    seconds[name].append(time.perf_counter() - started)
        equal = tokens["bagualu"] == tokens["transformers"]
        assert equal or given.dtype not in ("float32", "float64"), "the two do not generate the same tokens"
        speeds = {name: number * given.new_tokens / statistics.median(times) for name, times in seconds.items()}
        rows.append({"prompts": number, **{f"{name}_tokens_per_second": speed for name, speed in speeds.items()},
                     "ratio": speeds["bagualu"] / speeds["transformers"], "same_tokens": equal, "seconds": seconds})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bench_dense_124m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json")
    given = parser.parse_args()
    (rows,) = simulated.run(1, lambda communicator: measure(communicator, given, given.threads), threads=given.threads)
    print(f"{'prompts':>8}{'bagualu':>12}{'transformers':>14}{'ratio':>8}  tokens/s, {given.dtype}, {given.threads} threads")
    for row in rows:
        print(f"{row['prompts']:>8}{row['bagualu_tokens_per_second']:>12.1f}{row['transformers_tokens_per_second']:>14.1f}"
              f"{row['ratio']:>8.2f}")  # fmt: skip
    if given.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        machine = {"machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)), **versions}
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({**vars(given), **machine, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
