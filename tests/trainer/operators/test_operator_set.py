"""The model computes with the operators that it is given, wherever it has one, and what is predicted of a recipe follows them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.parallel.products import Products
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.models.decoder.cache import cached
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.operators.operator_set import BY_RULE, OperatorSet
from bagualu.trainer.simulation.trace import Traced, trace
from tests.covering import every_choice
from tests.parity import small_recipe

DENSE = ModelConfig(layers=2, hidden=8, heads=2, kv_heads=1, ffn=12, vocab=16, qk_norm=True)
NORMS = 2 + 2 * 4  # embedding_norm and the last; two of each layer, two of its heads


def counting(calls: Counter[str]) -> OperatorSet:
    def counted(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            calls[name] += 1
            return operator(*given, **named)

        return call

    class Counted(Products):
        def outputs(self, *given: Any, **named: Any) -> torch.Tensor:
            calls["linear"] += 1
            return super().outputs(*given, **named)

    functions = {name: counted(name, operator) for name, operator in vars(BY_RULE).items() if name != "linear"}
    return OperatorSet(**functions, linear=Counted())


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("moe", [MoEConfig(), MoEConfig(experts=2, top_k=1, ffn=4, shared_experts=1, every=1)], ids=["", "moe"])
def test_a_model_computes_with_the_operators_that_it_is_given(norm: str, moe: MoEConfig) -> None:
    calls = Counter[str]()
    config = replace(DENSE, norm=norm, moe=moe, embedding_norm=True)
    model = Decoder(config, [LayerSlice(0, 4)], operators=counting(calls))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.arange(6).view(1, 6)
    loss, _ = model(tokens, tokens)
    linear = 2 * (4 + 3) + 1 + (2 * 2 * 3 if moe.experts else 0)
    assert calls == {"norm": NORMS, "rotary": 4, "gate": 4 if moe.experts else 2, "attention": 2, "loss": 1, "linear": linear}
    plain = Decoder(config, [LayerSlice(0, 4)])
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(tokens, tokens)[0], loss)


def test_so_does_a_model_that_begins_to_generate() -> None:
    calls = Counter[str]()
    model = Decoder(DENSE, [LayerSlice(0, 4)], operators=counting(calls))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad(), cached(model, torch.zeros(1, dtype=torch.int64)) as columns, columns.adding(6, 6):
        model(torch.arange(6).view(1, 6))
    assert calls["attention"] == 2


@every_choice(variant=["blocks", "kernel", "tiles", "auto"], dtype=["float32", "bfloat16"], window=[None, 4])
def test_what_is_predicted_and_traced_follows_the_choice(variant: str, dtype: str, window: int | None) -> None:
    recipe = small_recipe(operators__attention=variant, train__dtype=dtype, model__window=window, comm__backend="gloo")
    predicted = work_of(recipe, recipe.validate(1)).attends_in_blocks(0)
    names = {operator.name for operator in trace(recipe, 1, 0, Traced("cpu")).operators()}
    assert ("aten._scaled_dot_product_flash_attention_for_cpu.default" in names) != predicted
    assert variant == "auto" or predicted == (variant == "blocks")
