"""A trace has what real ranks do: their communications, the FLOPs of their products and the memory of their tensors."""

from collections import Counter
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
from torch import nn

from bagualu.comm.calls import Communication, Pending, Waited
from bagualu.comm.group import Communicator
from bagualu.comm.recording import RecordingBackend
from bagualu.comm.world import World
from bagualu.parallel.memory_kinds import KINDS
from bagualu.parallel.simulation.events import Operator, RankTrace
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.costs.tensor_memory import TensorMemory
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.flops import attention_flops, layer_flops, model_flops_per_token
from bagualu.trainer.models.decoder.layers import FeedForward
from bagualu.trainer.models.decoder.shapes import layer_shapes
from bagualu.trainer.operators.float8 import scaled
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.results import Results
from bagualu.trainer.simulation.trace import Traced, Tracer, trace
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parallel.simulation.held import peak
from tests.trainer.models.styles import STYLES

SMALL = ["data.source=random", "data.sequence_length=32", "data.global_batch=8", "train.micro_batch=1"]
CUBE = ["parallel.data=2", "parallel.pipeline=2", "parallel.tensor=2"]


STYLED = {style: [f"model.{key}={value}" for key, value in changes.items()] for style, changes in STYLES.items()}


def recipe_of(*words: str) -> Recipe:
    return compose([words[0], *SMALL, *words[1:]])


def state_of(recipe: Recipe, communicator: Communicator) -> TrainerState:
    return assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))


def recorded(communicator: Communicator, recipe: Recipe) -> list[Communication | Waited]:
    """What a real rank does in its second step."""
    events: list[Communication | Waited] = []
    world = World(communicator.rank, communicator.size, communicator.rank)
    backend = RecordingBackend(world, 1.0, communicator.backend, lambda event, tensors: events.append(event))
    state = state_of(recipe, Communicator(backend, world, communicator.monitor))
    train_step(state, 0)
    events.clear()
    train_step(state, 1)
    return events


def communications(events: list[Any], routed: bool = False) -> list[tuple[Any, ...]]:
    """Each call, and each wait with the number of its call. `routed`: without the bytes of rows that a router sends to the experts
    of other ranks."""
    pending, calls = Pending[int](), 0
    told: list[tuple[Any, ...]] = []
    for event in events:
        if isinstance(event, Communication):
            pending.begin(event, calls)
            calls += 1
            size = 0 if routed and event.kind == "all_to_all" else event.bytes
            told.append((event.kind, event.group, event.size, size, event.peer))
        elif isinstance(event, Waited):
            told.append(("waited", pending.end(event)))
    return told


def events_of(traced: RankTrace) -> list[Any]:
    return [event for _, event in traced.events()]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["recipe=tiny_dense", *CUBE], marks=pytest.mark.slow),
        pytest.param(["recipe=moe_tiny", *CUBE], marks=pytest.mark.slow),
        ["recipe=moe_tiny", *CUBE, "parallel.expert=2", "optim.moments_dtype=bfloat16", "model.moe.bias_rate=0.001"],
        ["recipe=tiny_dense", *CUBE, "parallel.sequence=true", "parallel.zero=3", "train.recompute=full"],
        ["recipe=tiny_dense", *CUBE, "parallel.schedule=zb_v", "parallel.zero=2"],
        ["recipe=moe_tiny", *CUBE, "parallel.balance=[1.5,2.5]", "parallel.zero=3", "train.recompute=full"],
        pytest.param(
            ["recipe=tiny_dense", *CUBE, *STYLED["bloom"], "parallel.sequence=true", "parallel.zero=3"], marks=pytest.mark.slow
        ),
        pytest.param(["recipe=moe_tiny", *CUBE, *STYLED["qwen3"], "parallel.zero=2"], marks=pytest.mark.slow),
        ["recipe=moe_tiny", *CUBE, "model.lora.rank=4", "parallel.expert=2", "parallel.zero=3"],
    ],
    ids=["dense", "mixture", "experts", "zero-3", "zb-v", "halves", "bloom", "qwen3", "factors"],
)
def test_every_rank_communicates_as_in_its_trace(words: list[str]) -> None:
    """Three micro-batches are enough for a pipeline of two to alternate between forward and backward passes."""
    recipe = recipe_of(*words, "data.global_batch=6")
    real = run("simulated", 8, recorded, recipe)
    for rank in range(8):
        traced = trace(recipe, 8, rank, Traced("cpu"))
        routed = recipe.parallel.expert > 1
        assert communications(events_of(traced), routed) == communications(real[rank], routed)


@pytest.mark.parametrize("words", [["recipe=tiny_dense"], ["recipe=moe_tiny"], ["recipe=moe_tiny", "model.lora.rank=8"]])
@pytest.mark.parametrize("chip", ["cpu", "cuda"])
def test_products_have_the_flops_of_the_formula(words: list[str], chip: str) -> None:
    recipe = recipe_of(*words, "train.dtype=bfloat16" if chip == "cuda" else "train.dtype=float32")
    model, length = recipe.model, recipe.data.sequence_length
    tokens = recipe.data.global_batch * length
    flops = Counter[str]()
    for operator in trace(recipe, 1, 0, Traced(chip)).operators():
        if "attention" in operator.name:
            flops["backward" if "backward" in operator.name else "forward"] += operator.flops
        elif all(1 not in given.shape for given in operator.inputs):  # a norm on the CPU sums by a product with a vector
            flops["products"] += operator.flops
    attention = sum(attention_flops(model, i, length).attention for i in range(model.layers)) * tokens
    assert flops["forward"] == attention
    assert flops["backward"] == 2.5 * attention  # of a kernel that computes the scores again
    assert flops["products"] == (model_flops_per_token(model, length) - _for_no_one(model)) * tokens - 3 * attention


def _for_no_one(model: ModelConfig) -> float:
    """FLOPs for a token of the gradient of the first layer's input, which nothing needs where the embedding is not trained: in the
    formula, and not in a trace."""
    read = [shape for name, shape in layer_shapes(model, 0).items() if ".query." in name or ".key." in name or ".value." in name]
    inputs = [shape for shape in read if shape[1] == model.hidden]
    return sum(2 * prod(shape) for shape in inputs) if model.lora.rank else 0.0


def test_tensors_stand_for_those_of_the_chip() -> None:
    recipe = recipe_of("recipe=moe_tiny", "train.dtype=bfloat16")
    traced = {chip: trace(recipe, 1, 0, Traced(chip)) for chip in ("cpu", "cuda")}
    names = {chip: {operator.name.split(".")[1] for operator in one.operators()} for chip, one in traced.items()}
    fused = {"rms_norm", "rms_norm_backward", "_scaled_dot_product_flash_attention", "_grouped_mm", "_fused_adamw_"}
    assert fused <= names["cuda"]
    assert fused & names["cpu"] == {"_fused_adamw_"}


TWO = "data.global_batch=4"
"""Two micro-batches: a rank with no other is at its peak in the second one, which adds to gradients that are there."""


def peak_of(communicator: Communicator, recipe: Recipe) -> int:
    state = state_of(recipe, communicator)
    train_step(state, 0)
    with TensorMemory() as memory:
        memory.hold(tensor for _, tensor in state.engine.held())
        train_step(state, 1)
    return memory.peak


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=tiny_dense", TWO],
        ["recipe=moe_tiny", TWO],
        ["recipe=tiny_dense", "parallel.pipeline=2", "parallel.schedule=1f1b"],
        ["recipe=tiny_dense", "parallel.data=2", "parallel.zero=3"],
        ["recipe=tiny_dense", "parallel.data=2", "parallel.zero=2", "train.recompute=full"],
        *(["recipe=tiny_dense", TWO, *words] for words in STYLED.values()),
    ],
)
def test_a_trace_takes_the_memory_of_a_run(words: list[str]) -> None:
    recipe = recipe_of(*words, "model.hidden=96", "model.ffn=256", "data.sequence_length=128", "train.micro_batch=2")
    world = recipe.world_size()
    for rank, real in enumerate(run("gloo", world, peak_of, recipe)):
        fullest = peak(trace(recipe, world, rank, Traced("cpu")))
        assert fullest.bytes == pytest.approx(real, rel=0.1)
        assert sum(fullest.by_kind.values()) == fullest.bytes
        assert set(fullest.by_kind) <= set(KINDS)


class Twice(nn.Module):
    """A layer that no part of the tracer knows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = self.inner(x)
        return self.inner(torch.erf(first)) + first


def with_new_layer(*arguments: Any) -> TrainerState:
    state = assemble(*arguments)
    for module in state.engine.model.modules():
        if isinstance(getattr(module, "feed_forward", None), FeedForward):
            module.feed_forward = Twice(module.feed_forward)
    return state


def test_a_new_type_of_layer_is_in_the_trace() -> None:
    recipe = recipe_of("recipe=tiny_dense")
    before, after = (trace(recipe, 1, 0, Traced("cpu", assemble=made)) for made in (assemble, with_new_layer))
    extra = 18 * recipe.model.hidden * recipe.model.ffn * recipe.model.layers * recipe.data.global_batch * 32
    assert after.flops() - before.flops() == extra
    assert not any(operator.name.startswith("aten.erf") for operator in before.operators())
    assert any(operator.name.startswith("aten.erf") for operator in after.operators())
    assert peak(after).bytes > peak(before).bytes


@pytest.mark.parametrize("chip", ["cpu", "cuda"])
@pytest.mark.parametrize("style", [style for style in STYLES if style != "llama"])
def test_another_model_is_another_trace(style: str, chip: str) -> None:
    """Its products have the FLOPs of the formula, but for slopes, which make heads wider, and windows, of which no kernel knows."""
    words = ["recipe=tiny_dense", "data.global_batch=2", f"train.dtype={'bfloat16' if chip == 'cuda' else 'float32'}"]
    recipe, plain = recipe_of(*words, *STYLED[style]), trace(recipe_of(*words), 1, 0, Traced(chip))
    model, length, traced = recipe.model, recipe.data.sequence_length, trace(recipe, 1, 0, Traced(chip))
    tokens = recipe.data.global_batch * length
    attention = sum(attention_flops(model, i, length).attention for i in range(model.layers)) * tokens
    kernels = sum(operator.flops for operator in traced.operators() if "attention" in operator.name)
    wider = 1 + 8 / model.head_width * (model.positions == "alibi")
    if model.window is not None:
        assert traced.flops() > model_flops_per_token(model, length) * tokens
        return
    assert kernels == pytest.approx(3.5 * attention * wider)
    products = [one for one in traced.operators() if "attention" not in one.name and all(1 not in x.shape for x in one.inputs)]
    assert sum(one.flops for one in products) == model_flops_per_token(model, length) * tokens - 3 * attention
    counts = [Counter(operator.name for operator in one.operators()) for one in (plain, traced)]
    assert counts[0] != counts[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_that_pad_the_vocabulary_are_in_the_trace(rank: int) -> None:
    recipe = recipe_of("recipe=tiny_dense", "model.vocab=1000", "model.vocab_multiple=384", "parallel.tensor=2", "parallel.data=1")
    [looked_up] = {
        operator.inputs[0].shape for operator in trace(recipe, 2, rank).operators() if operator.name == "aten.embedding.default"
    }
    assert looked_up[0] == 1152 // 2


def test_every_expert_gets_its_share() -> None:
    recipe = recipe_of("recipe=moe_tiny", "parallel.data=2", "parallel.expert=2")
    even, uneven = (trace(recipe, 2, 0, Traced("cpu", shares)) for shares in (None, [0.4, 0.4, 0.1, 0.1]))
    assert even.flops() < uneven.flops()


def test_products_of_linear_layers_are_in_float8_if_the_recipe_asks_for_it() -> None:
    words = ["parallel.pipeline=2", "parallel.schedule=zb_h1", "data.global_batch=2"]
    half, narrow = (
        trace(recipe_of("recipe=moe_tiny", f"train.dtype={dtype}", *words), 2, 1) for dtype in ("bfloat16", "float8")
    )  # fmt: skip
    assert narrow.flops() == half.flops()
    products = [one for one in narrow.operators() if one.flops]
    in_float8 = [one for one in products if any(given.dtype.startswith("float8") for given in one.inputs)]
    assert {one.name for one in in_float8} == {"aten._scaled_mm_v2.default"}
    model = recipe_of("recipe=moe_tiny").model
    router = 2 * model.hidden * model.moe.experts  # in float32
    expected = sum(3 * (layer_flops(model, layer, 32).weights - router) for layer in (2, 3)) * 2 * 32
    assert sum(one.flops for one in in_float8) == expected
    assert not [one for one in narrow.operators() if "grouped_mm" in one.name], "a run multiplies for one expert after another"


def test_a_conversion_to_float8_is_traced_with_all_that_it_reads_and_writes() -> None:
    tracer = Tracer("cuda", Results())
    with tracer:
        scaled(torch.empty(64, 32, dtype=torch.bfloat16, device="meta"), torch.float8_e4m3fn, by_row=True)
    found = [event for section in tracer.end() for event in section.events if isinstance(event, Operator)]
    of_all = [one for one in found if any(tensor.shape == (64, 32) for tensor in one.inputs)]
    assert [one.name.split(".")[1] for one in of_all] == ["linalg_vector_norm", "div", "copy_"]
    elements, rows = 64 * 32, 64
    assert [one.read_bytes for one in of_all] == [2 * elements, 2 * elements + 4 * rows, 4 * elements]
    assert [one.written_bytes for one in of_all] == [2 * rows, 4 * elements, elements]


def test_weights_of_a_bucket_are_gathered_while_the_next_is_updated() -> None:
    traced = trace(recipe_of("recipe=tiny_dense", "parallel.data=2", "parallel.bucket_bytes=200000"), 2, 0)
    (events,) = (section.events for section in traced.sections if section.phase == "optimizer")
    gathers = [index for index, event in enumerate(events) if isinstance(event, Communication) and event.kind == "all_gather"]
    waits = [index for index, event in enumerate(events) if isinstance(event, Waited) and event.kind == "all_gather"]
    updates = [index for index, event in enumerate(events) if getattr(event, "name", "") == "aten._fused_adamw_.default"]
    assert len(gathers) == len(waits) > 3
    for gather, following in pairwise(gathers):
        assert [index for index in updates if gather < index < following], "nothing is updated between two gathers"
    assert min(waits) > max(gathers[-1], *updates)
