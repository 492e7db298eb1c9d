"""Draws the recipes whose memory is predicted and then measured (memory.py) from a grid. Free of torch.

    cd tests/bench && python -m contest.memory_recipes > memory_recipes.txt
    cd tests/bench && python -m contest.memory_recipes engines > memory_engine_recipes.txt

Both lists were drawn before the first measurement of any of their recipes. A recipe is a list of overrides. Layouts have at most 4
ranks, models at most 50 million parameters, so that two cores can measure all of them.
"""

import random
import sys
from itertools import count
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.trainer.recipe.compose import compose

COUNT, SEED = 12, 0
GRID: dict[str, list[str]] = {
    "layout": [
        "parallel.data=1",
        "parallel.data=2",
        "parallel.data=4",
        "parallel.tensor=2",
        "parallel.tensor=2 parallel.sequence=true",
        "parallel.data=2 parallel.tensor=2",
        "parallel.data=2 parallel.tensor=2 parallel.sequence=true",
        "parallel.pipeline=2",
        "parallel.pipeline=2 parallel.data=2",
        "parallel.pipeline=2 parallel.tensor=2",
        "parallel.data=2 parallel.expert=2",
        "parallel.data=4 parallel.expert=2",
    ],
    "zero": ["parallel.zero=0", "parallel.zero=1", "parallel.zero=2"],
    "dtype": ["train.dtype=float64", "train.dtype=float32", "train.dtype=bfloat16", "train.dtype=float16"],
    "schedule": [
        f"parallel.schedule={name}" for name in ("1f1b", "gpipe", "interleaved_1f1b", "zb_h1", "zb_v", "v_half", "dualpipe_v")
    ],
    "model": [
        "model.layers=8 model.hidden=256 model.heads=4 model.ffn=688 model.vocab=4096",
        "model.layers=4 model.hidden=512 model.heads=8 model.kv_heads=2 model.ffn=1344 model.vocab=8192",
        "model.layers=6 model.hidden=384 model.heads=6 model.ffn=1024 model.vocab=16000 model.tie_embeddings=true",
    ],
    "experts": [
        "",
        "model.moe.experts=8 model.moe.top_k=2 model.moe.ffn=352",
        "model.moe.experts=4 model.moe.top_k=1 model.moe.ffn=512 model.moe.shared_experts=1 model.moe.every=2",
    ],
    "recompute": ["train.recompute=none", "train.recompute=full"],
    "batch": [
        "data.sequence_length=256 data.global_batch=8 train.micro_batch=1",
        "data.sequence_length=256 data.global_batch=16 train.micro_batch=4",
        "data.sequence_length=1024 data.global_batch=8 train.micro_batch=1",
        "data.sequence_length=1024 data.global_batch=8 train.micro_batch=2",
    ],
    "optimizer": ["", "optim.moments_dtype=bfloat16", "optim.name=lion", "optim.name=sgd optim.momentum=0"],
    "groups": ["", "optim.groups=[{pattern:embedding.weight,frozen:true},{pattern:'layers.0.*',frozen:true}]"],
}
ENGINES = GRID | {
    "zero": [
        "parallel.zero=3",
        "parallel.zero=3 parallel.memory_bytes=2000000000",
        "parallel.engine=fsdp",
        "parallel.engine=fsdp parallel.shard=2",
        *(f"parallel.engine=deepspeed parallel.zero={stage}" for stage in (1, 2, 3)),
    ],
    "recompute": [f"train.recompute={which}" for which in ("none", "full", "attention", "every:2")],
    "optimizer": ["", "optim.moments_dtype=bfloat16", "optim.name=lion", "optim.name=muon"],
    "offload": ["", "", "train.offload_bytes=20000000"],
}
"""The grid of engines, and of stages that divide weights too."""
ONE_RANK_IN_THE_PIPELINE = "parallel.schedule=1f1b"
"""The schedule of a drawn recipe whose layout has no pipeline, where every schedule does the same."""


def draw(grid: dict[str, list[str]]) -> list[list[str]]:
    """Draws the recipes: a value of each row of `grid`, again where the recipe is refused or drawn already."""
    generator, drawn = random.Random(SEED), list[list[str]]()
    for _ in count():
        chosen = {row: generator.choice(values) for row, values in grid.items()}
        if "pipeline" not in chosen["layout"]:
            chosen["schedule"] = ONE_RANK_IN_THE_PIPELINE
        words = ["recipe=bench_dense", *(word for value in chosen.values() for word in value.split())]
        if words not in drawn and _valid(words):
            drawn.append(words)
        if len(drawn) == COUNT:
            return drawn
    raise AssertionError


def _valid(words: list[str]) -> bool:
    try:
        recipe: Any = compose([*words, "comm.backend=gloo"])
        recipe.validate(recipe.world_size())
    except RecipeError:
        return False
    return True


if __name__ == "__main__":
    print("\n".join(" ".join(words) for words in draw(ENGINES if sys.argv[1:] == ["engines"] else GRID)))
