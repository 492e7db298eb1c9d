"""The warm-up: every kind of layer, nothing of the run disturbed, bytes that agree with the shapes."""

import gc
from dataclasses import replace

import pytest
import torch

from bagualu.parallel.layout import Layout
from bagualu.trainer.costs.analytic import analytic_table
from bagualu.trainer.costs.measured import measure, measured_table
from bagualu.trainer.costs.tensor_memory import TensorMemory
from bagualu.trainer.costs.work import ModelWork, cpu_multiplies
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.lora import LoraConfig
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from tests.trainer.models.styles import STYLES

CPU = torch.device("cpu")


def work(dtype: str = "float32", layout: Layout | None = None, micro_batch: int = 2, style: str = "llama") -> ModelWork:
    mixture = MoEConfig(4, 2, 32, shared_experts=1, every=2)
    model = ModelConfig(4, 64, 4, 2, 96, 512, vocab_multiple=64, moe=mixture, **STYLES[style])
    return ModelWork(
        model, layout or Layout(), sequence_length=32, micro_batch=micro_batch, dtype=dtype, widens=not cpu_multiplies(dtype)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("layout", [Layout(), Layout(data=2, tensor=2, expert=2)], ids=str)
@pytest.mark.parametrize("micro_batch", [2, 40])  # one chunk of the head's, or more
@pytest.mark.parametrize("style", STYLES)
def test_bytes_held_are_those_that_shapes_give(dtype: str, layout: Layout, micro_batch: int, style: str) -> None:
    here = work(dtype, layout, micro_batch, style)
    measured, analytic = measured_table(here, measure(here, CPU, budget_seconds=0), ""), analytic_table(here)
    pairs = [
        (measured.embedding, analytic.embedding),
        (measured.head, analytic.head),
        *zip(measured.layers, analytic.layers, strict=True),
    ]
    for one, other in pairs:
        assert one.state_bytes == other.state_bytes
        assert one.input_bytes == other.input_bytes
        assert one.activation_bytes == pytest.approx(other.activation_bytes, rel=0.01)
        assert one.operand_bytes == pytest.approx(other.operand_bytes, rel=0.01)
        assert one.attention_bytes == pytest.approx(other.attention_bytes, rel=0.01)
        both = one.activation_bytes + one.work_bytes, other.activation_bytes + other.work_bytes
        assert both[0] == pytest.approx(both[1], rel=0.06)  # the sample keeps the gradient of its output to the end


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [Layout(), Layout(data=2, tensor=2, expert=2)], ids=str)
@pytest.mark.parametrize("targets", [["*"], ["query", "layers.1.*"]], ids=str)
def test_bytes_held_with_factors_are_those_that_shapes_give(dtype: str, layout: Layout, targets: list[str]) -> None:
    here = work(dtype, layout)
    model = replace(here.model, lora=LoraConfig(8, targets=targets))
    frozen = frozenset(name for name in parameter_shapes(model) if not model.lora.trains(name))
    here = replace(here, model=model, frozen=frozen)
    measured, analytic = measured_table(here, measure(here, CPU, budget_seconds=0), ""), analytic_table(here)
    for one, other in zip([*measured.layers, measured.head], [*analytic.layers, analytic.head], strict=True):
        assert one.state_bytes == other.state_bytes
        assert one.activation_bytes == pytest.approx(other.activation_bytes, rel=0.01)
        assert one.attention_bytes == pytest.approx(other.attention_bytes, rel=0.01)
        both = one.activation_bytes + one.work_bytes, other.activation_bytes + other.work_bytes
        assert both[0] == pytest.approx(both[1], rel=0.06)
        if targets == ["*"]:
            assert one.operand_bytes == pytest.approx(other.operand_bytes, rel=0.01)


def test_every_kind_is_timed_and_the_head_goes_back_in_its_forward_pass() -> None:
    wide = ModelWork(ModelConfig(2, 128, 4, 4, 256, 4096), Layout(), sequence_length=64, micro_batch=2, dtype="float32")
    found = measure(wide, CPU, budget_seconds=0.1)
    assert set(found) == {"embedding", "dense", "head"}
    assert set(measure(work(), CPU, budget_seconds=0)) == {"embedding", "dense", "mixture", "head"}
    for kind in ("dense", "head"):
        assert found[kind].forward_seconds > 0
        assert found[kind].input_gradient_seconds > 0
    assert found["dense"].weight_gradient_seconds > 0
    assert found["dense"].attention_seconds > 0
    assert found["head"].attention_bytes == found["embedding"].attention_bytes == 0
    assert found["embedding"].operand_bytes > 0
    assert found["head"].operand_bytes == 0


def test_layers_of_one_kind_cost_the_same_and_others_not() -> None:
    figures = measure(work(), CPU, budget_seconds=0)
    table = measured_table(work(), figures, "here")
    assert [layer.forward_seconds for layer in table.layers] == [
        figures["dense"].forward_seconds,
        figures["mixture"].forward_seconds,
    ] * 2
    assert table.source == "here"


def test_nothing_is_kept_of_what_was_measured() -> None:
    """Activations would stay for the whole run."""

    def kept() -> int:
        with TensorMemory() as memory:
            measure(work(), CPU, budget_seconds=0)
            gc.collect()
            return memory.bytes

    kept()
    assert kept() == 0


def test_it_leaves_the_generator_and_gradients_alone() -> None:
    before = torch.get_rng_state()
    measure(work(), CPU, budget_seconds=0)
    assert torch.equal(torch.get_rng_state(), before)
