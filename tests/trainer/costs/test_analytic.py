"""Costs from shapes, against the model itself: names and shapes, bytes that are really held, FLOPs that add up."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bagualu.comm.group import Communicator
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.layer_slice import LayerSlice, parts_of
from bagualu.trainer.assemble import assemble
from bagualu.trainer.costs.analytic import FLOPS_PER_SECOND, analytic_table
from bagualu.trainer.costs.state import rank_parameters
from bagualu.trainer.costs.work import ModelWork, work_of
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.activations import run as run_layer
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.flops import model_flops_per_token
from bagualu.trainer.models.decoder.lora import LoraConfig
from bagualu.trainer.models.decoder.model import Decoder, Layer
from bagualu.trainer.models.decoder.shapes import layer_buffers, layer_shapes, parameter_shapes
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.operator_set import operator_set
from bagualu.trainer.operators.tiles import attention_tiles
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe
from tests.harness import run
from tests.parity import small_recipe
from tests.trainer.models.styles import STYLES

MIXTURE = {
    "model__moe__experts": 4,
    "model__moe__top_k": 2,
    "model__moe__ffn": 8,
    "model__moe__shared_experts": 1,
    "model__moe__every": 2,
}


def moe_model(layers: int = 2, style: str = "llama") -> ModelConfig:
    return ModelConfig(layers, 16, 4, 2, 24, 64, moe=MoEConfig(4, 2, 8, shared_experts=1, every=2), **STYLES[style])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layer", [0, 1])
def test_the_shapes_are_those_of_the_model(layer: int, style: str) -> None:
    model = moe_model(style=style)
    model.moe.bias_rate = 0.0
    with torch.device("meta"):
        module = Layer(model, layer)
    assert list(layer_shapes(model, layer).items()) == [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    assert layer_buffers(model, layer) == {name: tuple(b.shape) for name, b in module.named_buffers()}
    assert not layer_buffers(moe_model(), layer)


@pytest.mark.parametrize("targets", [["*"], ["query", "layers.1.*"]], ids=str)
@pytest.mark.parametrize("style", ["llama", "gpt"])
def test_the_shapes_of_factors_are_those_of_the_model(style: str, targets: list[str]) -> None:
    model = moe_model(3, style)
    model.lora = LoraConfig(rank=3, targets=targets)
    with torch.device("meta"):
        module = Decoder(model, [LayerSlice.of_layers(range(3))])
    assert list(parameter_shapes(model).items()) == [(name, tuple(p.shape)) for name, p in module.named_parameters()]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_shapes_of_all_parameters_are_those_of_the_model(tied: bool, style: str) -> None:
    """And in its order, in which a rank's buckets are planned."""
    model = moe_model(3, style)
    model.tie_embeddings = tied
    with torch.device("meta"):
        module = Decoder(model, [LayerSlice.of_layers(range(3))])
    shapes = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    assert list(parameter_shapes(model).items()) == shapes
    work = ModelWork(model, Layout(), sequence_length=8, micro_batch=1, dtype="float32")
    assert [(name, shape) for name, shape, _ in rank_parameters(work, parts_of([LayerSlice(0, 6)]))] == shapes


def test_seconds_add_up_to_the_models_flops_and_the_head_is_all_forward() -> None:
    work = ModelWork(moe_model(), Layout(), sequence_length=8, micro_batch=3, dtype="float32")
    table = analytic_table(work)
    costs = [table.embedding, *table.layers, table.head]
    seconds = sum(one.forward_seconds + one.input_gradient_seconds + one.weight_gradient_seconds for one in costs)
    assert seconds == pytest.approx(24 * model_flops_per_token(work.model, 8) / FLOPS_PER_SECOND)
    assert table.head.forward_seconds == pytest.approx(24 * 6 * 16 * 64 / FLOPS_PER_SECOND)
    assert table.head.input_gradient_seconds == table.head.weight_gradient_seconds == 0


def test_layers_that_differ_in_their_windows_alone_have_costs_of_their_own() -> None:
    model = moe_model(4)
    model.moe, model.window, model.full_attention_every = MoEConfig(), 4, 2
    work = ModelWork(model, Layout(), sequence_length=64, micro_batch=1, dtype="float32")
    windowed, full = analytic_table(work).layers[:2]
    assert windowed.forward_seconds < full.forward_seconds
    assert [layer.forward_seconds for layer in analytic_table(work).layers[2:]] == [windowed.forward_seconds, full.forward_seconds]
    total = sum(layer.forward_seconds + layer.input_gradient_seconds + layer.weight_gradient_seconds
                for layer in analytic_table(work).layers)  # fmt: skip
    head = analytic_table(work).head.forward_seconds
    assert total + head == pytest.approx(64 * model_flops_per_token(model, 64) / FLOPS_PER_SECOND)


def kept(layer: Layer, x: torch.Tensor, again: bool) -> list[torch.Tensor]:
    """The tensors that a forward pass keeps for its backward pass; `again`: all of it is computed again."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_layer(layer, x, again)
    return saved


def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("layer", "parts"), [(0, ("none", "attention", "full")), (1, ("none", "attention", "experts", "full"))])
def test_recomputation_leaves_what_the_model_keeps(layer: int, parts: tuple[str, ...], style: str, rank: int | None) -> None:
    model = moe_model(style=style)
    model.lora.rank = rank
    cost = analytic_table(ModelWork(model, Layout(), sequence_length=32, micro_batch=4, dtype="float64")).layers[layer]
    for part in parts:
        module = Layer(model, layer, part).double()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        first, second = (torch.randn(4, 32, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
        shared, both = kept(module, first, part == "full"), kept(module, second, part == "full")
        own = sum(size for address, size in storages(both).items() if address not in storages(shared))
        assert own == pytest.approx(cost.kept_bytes(part), rel=0.2 if layer else 0), part


@pytest.mark.skipif(attention_tiles.lacks() is not None, reason="attention in tiles needs another CPU, or a compiler")
@pytest.mark.parametrize(("kv_heads", "length"), [(4, 32), (2, 33)])
def test_attention_in_tiles_keeps_what_is_predicted(kv_heads: int, length: int) -> None:
    """Keys as they are shared, the output and the statistics."""
    model = ModelConfig(1, 64, 4, kv_heads, 96, 64)
    work = ModelWork(model, Layout(), length, micro_batch=3, dtype="bfloat16", operators=OperatorsConfig(attention="tiles"))
    layer = Layer(model, 0, operators=operator_set(work.operators, "cpu")).bfloat16()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    first, second = (torch.randn(3, length, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    shared, both = kept(layer, first, False), kept(layer, second, False)
    own = sum(size for address, size in storages(both).items() if address not in storages(shared))
    assert own == analytic_table(work).layers[0].activation_bytes
    elsewhere = replace(work, operators=OperatorsConfig(attention="kernel"))
    assert own < analytic_table(elsewhere).layers[0].activation_bytes or kv_heads == 4


def test_the_parts_of_a_layer_add_up() -> None:
    for cost in analytic_table(ModelWork(moe_model(), Layout(), sequence_length=8, micro_batch=3, dtype="float32")).layers:
        assert 0 < cost.halves[0].forward_seconds < cost.forward_seconds
        assert cost.again_seconds("attention") + cost.again_seconds("experts") == pytest.approx(cost.again_seconds("full"))
        assert cost.again_seconds("none") == 0
        freed = [cost.activation_bytes - cost.kept_bytes(part) for part in ("none", "attention", "experts", "full")]
        assert freed[0] == 0 < min(freed[1:])
        assert freed[1] + freed[2] == freed[3] - cost.input_bytes  # the input of the second part


def state_held(communicator: Communicator, recipe: Recipe) -> tuple[int, int, int]:
    """Bytes of weights, gradients, optimizer and buffers that this rank has; what pads them at the most; what the table says."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    held = [tensor.untyped_storage() for _, tensor in state.engine.held()]
    pads = sum((bucket.group.size * 8 + 8) * 8 * 5 for bucket in state.engine.buckets)
    table = analytic_table(work_of(recipe, state.mesh.layout))
    layers = list(map(int, state.engine.model.layers))
    said = sum(table.layers[layer].state_bytes for layer in layers)
    said += table.embedding.state_bytes * state.mesh.first_stage + table.head.state_bytes * state.mesh.last_stage
    said -= table.tied_bytes * state.mesh.first_stage * state.mesh.last_stage
    angles = 2 * recipe.data.sequence_length * recipe.model.head_width * work_of(recipe, state.mesh.layout).accurate_bytes
    return sum(one.nbytes() for one in {one.data_ptr(): one for one in held}.values()), pads, said - angles * len(layers)


TIED = {"model__tie_embeddings": True, "data__global_batch": 8}
ZERO_2 = {"parallel__zero": 2, "train__dtype": "bfloat16", "optim__moments_dtype": "bfloat16"}
LORA = {"model__lora__rank": 3}
FROZEN = {"optim__groups": [{"pattern": name, "frozen": True} for name in ("embedding.weight", "layers.0.*", "*.router.weight")]}


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (2, {"parallel__pipeline": 2, "train__dtype": "bfloat16"}),
        (4, {"parallel__tensor": 2, **MIXTURE, "train__dtype": "bfloat16"}),
        (4, {"parallel__expert": 2, **MIXTURE}),
        (4, {"parallel__data": 4, "parallel__zero": 0, "train__dtype": "float32"}),
        (8, {"parallel__data": 4, "parallel__pipeline": 2, **TIED, **ZERO_2}),
        (8, {"parallel__data": 4, "parallel__tensor": 2, "parallel__sequence": True, **MIXTURE, **ZERO_2}),
        (8, {"parallel__data": 4, "parallel__pipeline": 2, **TIED, **ZERO_2, **MIXTURE, "optim__name": "muon"}),
        (4, {"parallel__data": 2, "parallel__pipeline": 2, **TIED, **FROZEN, **MIXTURE}),
        (4, {"parallel__data": 2, "parallel__pipeline": 2, **FROZEN, "model__moe__bias_rate": 0.1, **MIXTURE}),
        (8, {"parallel__data": 4, "parallel__tensor": 2, "parallel__expert": 2, **LORA, **ZERO_2, **MIXTURE}),
    ],
    ids=[
        "one rank",
        "pipeline",
        "tensor x data, mixture",
        "expert x data, mixture",
        "not partitioned",
        "zero 2, tied ends",
        "zero 2, sequence",
        "muon",
        "frozen and tied",
        "frozen and biases",
        "factors",
    ],
)
def test_state_is_what_ranks_hold(ranks: int, changes: dict[str, object]) -> None:
    for held, pads, said in run("simulated", ranks, state_held, small_recipe(**changes)):
        assert said <= held <= said + pads


def shares(recipe_name: str, part: str) -> tuple[float, float]:
    """Returns which share of its activations a layer keeps if it recomputes `part`, and by which share its passes take longer."""
    recipe = compose([f"recipe={recipe_name}", "train.dtype=bfloat16", "comm.backend=gloo"])
    layer = analytic_table(work_of(recipe, recipe.validate(1))).layers[0]
    seconds = layer.forward_seconds + layer.input_gradient_seconds + layer.weight_gradient_seconds
    return layer.kept_bytes(part) / layer.activation_bytes, layer.again_seconds(part) / seconds


SHARES = [("bench_dense_124m", "attention"), ("bench_moe", "experts"), ("bench_dense_124m", "full")]


@pytest.mark.parametrize(("recipe", "part"), SHARES)
def test_the_guide_says_what_recomputation_saves_and_costs(recipe: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For chips that multiply bfloat16 themselves, whatever this CPU does: others keep copies in float32."""
    monkeypatch.setattr("bagualu.trainer.costs.work.cpu_multiplies", lambda dtype: True)
    guide = (Path(__file__).parents[3] / "docs/guides/memory.md").read_text(encoding="utf-8")
    (row,) = (line for line in guide.splitlines() if line.startswith(f"| `{part}` |"))
    *_, kept, longer = re.findall(r"(\d+)%", row)
    assert [f"{share:.0%}" for share in shares(recipe, part)] == [f"{kept}%", f"{longer}%"]
