"""The router: what it is weighted by, and what it learns from the loss alone."""

import pytest
import torch
import torch.nn.functional as F

from bagualu.comm.errors import RecipeError
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.moe import MixtureOfExperts
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
    output, _ = model(x)
    expected = plainly(model, x, top_k, renormalised)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    (own,) = torch.autograd.grad(output.square().sum(), model.router.weight, retain_graph=True)
    (plain,) = torch.autograd.grad(expected.square().sum(), model.router.weight)
    torch.testing.assert_close(own, plain, rtol=1e-10, atol=1e-12)
    assert own.norm() > 1e-3


def test_to_renormalise_one_probability_is_refused() -> None:
    changes = {"model__moe__experts": EXPERTS, "model__moe__ffn": 8, "model__moe__renormalise": True}
    with pytest.raises(RecipeError, match=r"give model\.moe\.renormalise=false or model\.moe\.top_k=2"):
        small_recipe(**changes, model__moe__top_k=1).validate(1)
    small_recipe(**changes, model__moe__top_k=2).validate(1)


def test_to_renormalise_a_dense_model_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model\.moe\.renormalise=.* has no effect with model\.moe\.experts=0"):
        small_recipe(model__moe__renormalise=False).validate(1)
