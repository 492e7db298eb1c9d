"""Low-rank factors against plain autograd on merged weights; which weights have some, and what they begin with."""

from dataclasses import replace

import pytest
import torch

from bagualu.comm.errors import RecipeError
from bagualu.parallel.boxes import Box
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.identity import lora_of, model_of
from bagualu.trainer.models.decoder.initialise import seeded_values
from bagualu.trainer.models.decoder.lora import FIRST, SECOND, LoraConfig
from bagualu.trainer.models.decoder.plan import decoder_plan
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from tests.trainer.models import reference
from tests.trainer.models.decoder.test_model import config_of, filled, tokens

LORA = LoraConfig(rank=3, alpha=4.5)
VARIANTS = ("grouped_query", "tied", "moe_gelu_shared", "moe_every_2_shared", "moe_and_norms_after_blocks", "gpt", "qwen3", "olmo3")
SEVEN = ("attention.query", "attention.key", "attention.value", "attention.output", "feed_forward.gate", "feed_forward.up",
         "feed_forward.down")  # fmt: skip


def merged(weights: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    bases = {name: weight for name, weight in weights.items() if not name.endswith((FIRST, SECOND))}
    adapted = {name for name in bases if name + FIRST in weights}
    return {
        name: weight + scale * weights[name + SECOND] @ weights[name + FIRST] if name in adapted else weight
        for name, weight in bases.items()
    }


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("targets", [["*"], ["query", "down", "layers.1.*"]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_factors_are_those_of_merged_weights(variant: str, targets: list[str], recompute: str) -> None:
    """Also where nothing before the first factor is trained."""
    config = replace(config_of(variant), lora=replace(LORA, targets=targets))
    model = filled(config, torch.float64, [recompute] * config.layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.lora.trains(name))
    inputs, labels = tokens(config)
    loss, balance = model(inputs, labels)
    weights = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    mean, expected_balance = reference.losses(config, merged(weights, 1.5), inputs, labels)

    counted = (labels != -100).sum()
    torch.testing.assert_close(loss / counted, mean, rtol=1e-10, atol=0)
    torch.testing.assert_close(balance, expected_balance, rtol=1e-10, atol=0)
    (loss / counted + 0.3 * balance).backward()
    (mean + 0.3 * expected_balance).backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(name.endswith((FIRST, SECOND)) for name in trained)
    assert len(trained) >= 4
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        expected = weights[name].grad
        assert expected is not None
        assert expected.abs().max() > 1e-6, f"{name} takes no part: the comparison would show nothing"
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_whose_second_factors_are_zero_is_the_model_without_factors_to_the_bit() -> None:
    config = config_of("moe_every_2_shared")
    plain, adapted = filled(config, torch.float32), filled(replace(config, lora=LORA), torch.float32)
    adapted.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in adapted.named_parameters():
        if name.endswith(SECOND):
            parameter.data.zero_()
    assert torch.equal(plain(*tokens(config))[0], adapted(*tokens(config))[0])


def test_every_linear_layer_of_attention_and_feed_forward_has_factors_and_nothing_else() -> None:
    model = ModelConfig(layers=2, bias="all", qk_norm=True, lora=LORA, moe=MoEConfig(experts=4, every=2, shared_experts=1))
    shapes = parameter_shapes(model)
    adapted = {name.removesuffix(FIRST) for name in shapes if name.endswith(FIRST)}
    experts = {f"layers.1.feed_forward.experts.{one}" for one in ("gate", "up", "down")}
    shared = {f"layers.1.feed_forward.shared.{one}.weight" for one in ("gate", "up", "down")}
    attention = {f"layers.1.{one}.weight" for one in SEVEN if one.startswith("attention")}
    assert adapted == {f"layers.0.{one}.weight" for one in SEVEN} | attention | experts | shared
    for name in adapted:
        *stacked, outputs, inputs = shapes[name]
        assert (shapes[name + FIRST], shapes[name + SECOND]) == ((*stacked, 3, inputs), (*stacked, outputs, 3))


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["query", "value"], 4), (["layers.1.*"], 7), (["*.attention.*", "layers.0.feed_forward.up.weight"], 9), (["*.weight"], 14)],
    ids=str,
)
def test_targets_are_own_names_or_patterns_of_names(targets: list[str], count: int) -> None:
    model = ModelConfig(layers=2, lora=replace(LORA, targets=targets))
    assert sum(name.endswith(FIRST) for name in parameter_shapes(model)) == count


def test_a_factor_is_split_as_its_weight_along_the_dim_that_they_share() -> None:
    plan = decoder_plan(ModelConfig(lora=LORA, moe=MoEConfig(experts=4, every=2)), sequence=True)
    places = {
        "attention.query.weight": ((), "tensor", ((0, "tensor"),), None),
        "attention.output.weight": (((1, "tensor"),), None, (), "tensor"),
        "feed_forward.down.weight": (((1, "tensor"),), None, (), "tensor"),
        "feed_forward.experts.up": (((0, "expert"),), "tensor", ((0, "expert"), (1, "tensor")), None),
        "feed_forward.experts.down": (((0, "expert"), (2, "tensor")), None, ((0, "expert"),), "tensor"),
    }
    for name, expected in places.items():
        first, second = (plan.placement(f"layers.0.{name}{factor}") for factor in (FIRST, SECOND))
        assert (first.shards, first.partial_over, second.shards, second.partial_over) == expected, name


def test_factors_begin_as_in_torchs_linear_layers_and_at_zero() -> None:
    model = ModelConfig(hidden=2048, lora=replace(LORA, rank=64))
    fill, whole = seeded_values(model, 7), Box((0, 0), (64, 2048))
    first = fill(f"layers.0.attention.query.weight{FIRST}", whole.shape, whole)
    assert float(first.std()) == pytest.approx((3 * 2048) ** -0.5, rel=0.01)
    assert float(torch.nn.Linear(2048, 64).weight.detach().std()) == pytest.approx(float(first.std()), rel=0.02)
    assert not fill(f"layers.0.attention.query.weight{SECOND}", (2048, 64), Box((0, 0), (2048, 64))).any()


def test_the_identity_of_a_checkpoint_holds_the_factors() -> None:
    for lora in (LoraConfig(), LORA, LoraConfig(rank=4, targets=["query"])):
        model = ModelConfig(lora=lora)
        assert model_of(model.identity()).identity() == model.identity()
        assert lora_of(model.identity()).scale == lora.scale
    assert ModelConfig(lora=LoraConfig(rank=4)).identity() == ModelConfig(lora=LoraConfig(rank=4, alpha=4.0)).identity()
    assert lora_of(None) == lora_of({"model.hidden": 8}) == LoraConfig()  # of a checkpoint from before there were factors


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rank": 0}, r"model\.lora\.rank=0 must be at least 1, or leave it out"),
        ({"rank": -3}, r"model\.lora\.rank=-3 must be at least 1"),
        ({"alpha": 2.0}, r"model\.lora\.alpha=2\.0 has no effect with model\.lora\.rank=null; change model\.lora\.rank or leave"),
        ({"targets": ["query"]}, r"model\.lora\.targets=\['query'\] has no effect with model\.lora\.rank=null"),
        ({"rank": 4, "alpha": 0.0}, r"model\.lora\.alpha=0\.0 must be positive; give e\.g\. model\.lora\.alpha=4"),
        ({"rank": 4, "targets": []}, r"model\.lora\.targets=\[\] leaves nothing to train; leave it out for all"),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        ModelConfig(lora=LoraConfig(**changes)).validate()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("q_proj", "q_proj matches no parameter; give some of query, key, value, output, gate, up, down, or a pattern of names "
                   "such as layers.0.attention.query.weight"),
        ("layers.7.*", "layers.7.* matches no parameter"),
        ("head.weight", "head.weight is no linear layer of attention or feed-forward"),
        ("*norm.weight", "*norm.weight is no linear layer of attention or feed-forward"),
    ],
)  # fmt: skip
def test_a_target_that_names_no_linear_layer_is_refused(target: str, expected: str) -> None:
    lora = replace(LORA, targets=["query", target])
    with pytest.raises(RecipeError) as refused:
        lora.check_targets(parameter_shapes(ModelConfig(layers=2, lora=lora)))
    assert f"model.lora.targets: {expected}" in str(refused.value)
