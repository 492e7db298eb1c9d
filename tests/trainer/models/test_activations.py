"""What a rank keeps of its activations, counted: by recomputation up to a number of bytes, and with a part in host memory."""

import gc
from typing import Any

import pytest
import torch
from torch import nn

from bagualu.comm.group import Communicator
from bagualu.comm.monitor import Phase
from bagualu.parallel.balance.stages.activations import Activations
from bagualu.parallel.balance.stages.problem import Problem
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.costs.analytic import analytic_table
from bagualu.trainer.costs.tensor_memory import TensorMemory
from bagualu.trainer.costs.work import ModelWork, work_of
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.activations import HostMemory
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import small_recipe

LAYERS, SEQUENCE, HIDDEN = 6, 32, 32
OUTPUT = SEQUENCE * HIDDEN * 8
"""Bytes of a stage's output for a micro-batch, which the pipeline holds until the backward pass."""
LAYER = 118784
"""Bytes of activations of a layer for a micro-batch."""


class DeviceBytes(TensorMemory):
    """Counts the bytes of tensors that are made within it and still exist, but for those in host memory."""

    def __init__(self, host: HostMemory) -> None:
        super().__init__()
        self.host, self.most = host, 0
        self.between_passes = 0
        """The most bytes at the beginning of a pass."""

    def __torch_dispatch__(self, *call: Any) -> Any:
        result = super().__torch_dispatch__(*call)
        self.most = max(self.most, self.on_device)
        return result

    @property
    def on_device(self) -> int:
        return self.bytes - self.host.bytes

    def at(self, phase: Phase, step: int) -> None:
        if phase in (Phase.FORWARD, Phase.BACKWARD):
            self.between_passes = max(self.between_passes, self.on_device)

    def waits(self, what: str | None) -> None:
        """Observers of a monitor have this method."""


def counted(communicator: Communicator, recipe: Recipe) -> tuple[int, int, int, list[str], float]:
    """Most bytes between passes and at any moment of step 2; those that were forecast; what recomputes; the loss."""
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    train_step(state, 0)
    with DeviceBytes(state.engine.model.host_memory) as device:
        state.mesh.monitor.observers.append(device)
        loss = train_step(state, 1).loss
    assert state.engine.model.host_memory.bytes == 0
    return device.between_passes, device.most, forecast_on_a_device(state), state.split.recompute, loss


def forecast_on_a_device(state: TrainerState) -> int:
    """The most bytes besides the state that are forecast for this rank if the memory of its device is not that of the host."""
    layout, slices = state.mesh.layout, [state.split.slices[stage] for stage in state.mesh.stages]
    activations = Activations(tuple(state.split.recompute), offload_bytes=state.recipe.train.offload_bytes)
    table = analytic_table(work_of(state.recipe, layout))
    problem = Problem(table, state.schedule, [1.0] * layout.pipeline, None, activations)
    return problem.transient_bytes(state.mesh.at("pipeline"), tuple(problem.pieces(slices)))


def recipe(**changes: Any) -> Recipe:
    shape = {"model__layers": LAYERS, "model__hidden": HIDDEN, "model__ffn": 64, "data__sequence_length": SEQUENCE}
    return small_recipe(**shape, **{"parallel__pipeline": 2, "parallel__memory_bytes": 10**9, **changes})


@pytest.mark.parametrize(("schedule", "in_flight"), [("1f1b", 2), ("gpipe", 8), ("zb_v", 8)])
def test_every_rank_keeps_at_most_the_given_bytes(schedule: str, in_flight: int) -> None:
    """Besides outputs of stages in flight, messages on their way and token ids; and it recomputes no layer more than it must."""
    plain = run("simulated", 2, counted, recipe(parallel__schedule=schedule))
    most, others = 2 * max(between for between, *_ in plain) // 3, (in_flight + 3) * OUTPUT
    limited = run("simulated", 2, counted, recipe(parallel__schedule=schedule, train__recompute=f"bytes:{most}"))
    for between, _, _, recompute, loss in limited:
        assert between <= most + others
        assert 0 < recompute.count("full") < LAYERS
        assert loss == plain[0][-1]
    assert max(between for between, *_ in plain) > most + others
    assert max(between for between, *_ in limited) > most - in_flight * LAYER


@pytest.mark.parametrize(
    ("schedule", "recompute", "offload_bytes"),
    [("1f1b", "none", 4 * LAYER), ("1f1b", "none", 10**8), ("gpipe", "attention", 4 * LAYER), ("gpipe", "none", 10**8)],
)
def test_host_memory_takes_its_bytes_off_the_device(schedule: str, recompute: str, offload_bytes: int) -> None:
    """Also of the peak, by as much as the forecast says."""
    shared = {"parallel__schedule": schedule, "train__recompute": recompute}
    plain = run("simulated", 2, counted, recipe(**shared))
    moved = run("simulated", 2, counted, recipe(**shared, train__offload_bytes=offload_bytes))
    for (before, peak_before, forecast_before, *_), (after, peak, forecast, _, loss) in zip(plain, moved, strict=True):
        assert loss == plain[0][-1]
        if offload_bytes + 2 * LAYER < before:
            assert offload_bytes - LAYER - OUTPUT <= before - after <= offload_bytes  # the layer that leaves is on both
        assert peak_before - peak >= forecast_before - forecast - 2 * OUTPUT  # a gradient, and room for less than a tensor
    assert any(forecast_before > forecast for (_, _, forecast_before, *_), (_, _, forecast, *_) in zip(plain, moved, strict=True))


def decoder(offload_bytes: int, layers: int = 3) -> tuple[Decoder, torch.Tensor, ModelConfig]:
    config = ModelConfig(layers=layers, hidden=HIDDEN, heads=4, kv_heads=4, ffn=64, vocab=64)
    model = Decoder(config, [LayerSlice.of_layers(range(layers))], offload_bytes=offload_bytes).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return model, torch.arange(2 * SEQUENCE).view(2, SEQUENCE) % config.vocab, config


def test_all_activations_leave_once_and_no_weight_does() -> None:
    model, tokens, config = decoder(2**30)
    loss, _ = model(tokens, tokens)
    table = analytic_table(ModelWork(config, Layout(), SEQUENCE, 2, "float64"))
    angles = 2 * SEQUENCE * config.head_width * 8
    held_by_others = angles  # of the last layer; those of the layers before it were found to be held by the model anyway
    assert model.host_memory.bytes == sum(layer.activation_bytes for layer in table.layers) + held_by_others
    loss.backward()
    assert model.host_memory.bytes == 0


class Product(nn.Module):
    """Keeps its input, and a view of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def test_a_layers_input_leaves_but_no_view_of_a_weight_nor_the_input_of_a_stage() -> None:
    memory, first, layers = HostMemory(2**30), torch.ones(SEQUENCE, HIDDEN, requires_grad=True), [Product(), Product()]
    saving, x, in_host = memory.begin_pass(), first, []
    for layer in layers:
        with saving():
            x = layer(x)
        in_host.append(memory.bytes)
    assert in_host == [0, first.nbytes]
    x.sum().backward()
    assert all(torch.equal(layer.weight.grad, torch.full((HIDDEN, HIDDEN), float(SEQUENCE))) for layer in layers)


def test_activations_come_back_a_layer_ahead() -> None:
    memory, x = HostMemory(2**30), torch.ones(1000, requires_grad=True) + 1
    saving, in_host = memory.begin_pass(), []
    for _ in range(4):
        x.register_hook(lambda _: in_host.append(memory.bytes // 4000))
        with saving():
            x = x.sin()  # keeps x
    assert memory.bytes == 4 * 4000
    x.sum().backward()
    assert in_host == [2, 1, 0, 0]


@pytest.mark.gpu
def test_the_allocators_peak_falls_on_a_gpu() -> None:
    """The peak falls by the bytes that are offloaded, except those of a few layers, and no bit of the results changes."""
    results, peaks = [], []
    for offload_bytes in (0, 2**30):
        config = ModelConfig(layers=8, hidden=512, heads=8, kv_heads=8, ffn=1024, vocab=512)
        model = Decoder(config, [LayerSlice.of_layers(range(8))], offload_bytes=offload_bytes).to("cuda", torch.bfloat16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator("cuda").manual_seed(1))
        tokens = torch.arange(4096, device="cuda").view(8, 512) % config.vocab
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = model(tokens, tokens)
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(plain, moved) for plain, moved in zip(*results, strict=True))
    layer = 8 * 512 * 2 * (2 * 512 + 5 * 512 + 512 + 3 * 1024)
    assert peaks[0] - peaks[1] > 4 * layer


def test_what_is_never_used_leaves_the_host_too() -> None:
    model, tokens, _ = decoder(2**30)
    loss, _ = model(tokens, tokens)
    assert model.host_memory.bytes > 0
    del loss, _
    gc.collect()
    assert model.host_memory.bytes == 0


def test_a_validation_keeps_nothing() -> None:
    model, tokens, _ = decoder(2**30)
    with torch.no_grad():
        loss, _ = model(tokens, tokens)
    assert model.host_memory.bytes == 0
    assert loss.isfinite()
