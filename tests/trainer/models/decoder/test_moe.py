"""The router: what it is weighted by, and what it learns from the loss alone."""

import functools

import pytest
import torch
import torch.nn.functional as F

from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.trainer.assemble import assemble
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.moe import MixtureOfExperts, update_biases
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import small_recipe

EXPERTS = 4


def mixture(**changes: object) -> MixtureOfExperts:
    """In float64 with random weights; B = 2, S = 5, H = 8."""
    draw = torch.Generator().manual_seed(3)
    config = ModelConfig(hidden=8, moe=MoEConfig(experts=EXPERTS, ffn=6, **changes))  # type: ignore[arg-type]
    model = MixtureOfExperts(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=draw)
    return model


def inputs() -> torch.Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def plainly(model: MixtureOfExperts, x: torch.Tensor, top_k: int, renormalise: bool) -> torch.Tensor:
    """The same mixture with every expert computed for every token."""
    probabilities = (x @ model.router.weight.T).softmax(-1)
    kept = probabilities * F.one_hot(probabilities.topk(top_k).indices, EXPERTS).sum(-2)
    weights = kept / kept.sum(-1, keepdim=True) if renormalise else kept
    experts = model.experts
    hidden = F.silu(torch.einsum("bsh,efh->bsef", x, experts.gate)) * torch.einsum("bsh,efh->bsef", x, experts.up)
    return torch.einsum("bsef,ehf,bse->bsh", hidden, experts.down, weights)


@pytest.mark.parametrize(
    ("top_k", "renormalise", "renormalised"),
    [(1, None, False), (1, False, False), (2, None, True), (2, True, True), (2, False, False), (3, None, True), (4, False, False)],
)
def test_the_loss_gives_the_router_the_gradient_of_the_plain_formula(
    top_k: int, renormalise: bool | None, renormalised: bool
) -> None:
    model, x = mixture(top_k=top_k, renormalise=renormalise), inputs()
    output, _, _ = model(x)
    expected = plainly(model, x, top_k, renormalised)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    (own,) = torch.autograd.grad(output.square().sum(), model.router.weight, retain_graph=True)
    (plain,) = torch.autograd.grad(expected.square().sum(), model.router.weight)
    torch.testing.assert_close(own, plain, rtol=1e-10, atol=1e-12)
    assert own.norm() > 1e-3


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_bias_counts_in_the_choice_and_not_in_the_weight(renormalise: bool) -> None:
    model, x = mixture(top_k=2, renormalise=renormalise, bias_rate=0.1), inputs()
    model.router.bias = torch.tensor([0.0, 2.0, 0.0, 3.0], dtype=torch.float64)  # more than any probability: 1 and 3 are chosen
    weights, chosen = model.router.choose(model.router(x))
    assert chosen.unique().tolist() == [1, 3]
    kept = (x @ model.router.weight.T).softmax(-1).gather(-1, chosen)
    torch.testing.assert_close(weights, kept / kept.sum(-1, keepdim=True) if renormalise else kept)
    assert model(x)[2].tolist() == [0, 10, 0, 10], "the load: every token of 2 x 5 went to both"


def test_biases_rise_where_experts_got_few_tokens_and_fall_where_they_got_many() -> None:
    biases = [torch.zeros(4), torch.ones(4)]
    update_biases(torch.tensor([[0.0, 10.0, 7.0, 3.0], [5.0, 5.0, 5.0, 5.0]]), biases, 0.25)
    assert [bias.tolist() for bias in biases] == [[0.25, -0.25, -0.25, 0.25], [1.0, 1.0, 1.0, 1.0]]


@functools.cache
def spread(rate: float | None) -> float:
    return spread_after(60, rate)


def spread_after(steps: int, rate: float | None, **changes: object) -> float:
    """How far the loads of the experts are from even after some steps without a balance loss: fullest / mean."""
    recipe = small_recipe(model__layers=1, model__moe__experts=8, model__moe__ffn=8, model__moe__bias_rate=rate, optim__lr=1e-3,
                          model__moe__balance_loss=0.0, data__sequence_length=32, train__steps=steps, **changes)  # fmt: skip
    return run("simulated", 1, fullest_of, recipe)[0]


def fullest_of(communicator: Communicator, recipe: Recipe) -> float:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    loads = []

    def note(module: object, arguments: object, output: tuple[torch.Tensor, ...]) -> None:
        loads.append(output[2].double())

    state.engine.model.layers["0"].feed_forward.register_forward_hook(note)
    for step in range(recipe.train.steps):
        train_step(state, step)
    load = torch.stack(loads[len(loads) // 2 :]).sum(0)
    return float(load.max() / load.mean())


def test_biases_even_out_the_load_without_a_balance_loss() -> None:
    assert spread(None) > 1.4
    assert spread(0.02) < 1.1


def test_a_rate_of_0_keeps_the_biases() -> None:
    assert spread(0.0) == spread(None)


@pytest.mark.parametrize("rate", [-0.1, 1.5, 3e38, 1e39, 1e-50, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    recipe = small_recipe(model__moe__experts=EXPERTS, model__moe__ffn=8, model__moe__bias_rate=rate, train__dtype="bfloat16")
    with pytest.raises(RecipeError, match=r"model\.moe\.bias_rate=.*(; give |leave it out)"):
        recipe.validate(1)


def test_a_rate_without_a_choice_is_refused() -> None:
    recipe = small_recipe(model__moe__experts=4, model__moe__top_k=4, model__moe__ffn=8, model__moe__bias_rate=0.1)
    with pytest.raises(RecipeError, match=r"has no effect with model\.moe\.top_k=4.*; change model\.moe\.top_k or leave it out"):
        recipe.validate(1)


def test_to_renormalise_one_probability_is_refused() -> None:
    changes = {"model__moe__experts": EXPERTS, "model__moe__ffn": 8, "model__moe__renormalise": True}
    with pytest.raises(RecipeError, match=r"give model\.moe\.renormalise=false or model\.moe\.top_k=2"):
        small_recipe(**changes, model__moe__top_k=1).validate(1)
    small_recipe(**changes, model__moe__top_k=2).validate(1)


def test_to_renormalise_a_dense_model_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model\.moe\.renormalise=.* has no effect with model\.moe\.experts=0"):
        small_recipe(model__moe__renormalise=False).validate(1)


def test_biases_of_a_frozen_router_stay() -> None:
    frozen = [{"pattern": "*.router.weight", "frozen": True}]
    after = {rate: spread_after(15, rate, optim__groups=frozen) for rate in (None, 0.0, 0.02)}
    assert after[0.02] == after[0.0] == after[None]
    assert spread_after(15, 0.02) != after[0.02]
