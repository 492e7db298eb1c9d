"""The serial decoder against the naive reference: what every layout is compared with is right itself."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.model import Decoder, Head
from tests.trainer.models import reference
from tests.trainer.models.styles import STYLES

MOE = MoEConfig(experts=4, top_k=2, ffn=6)
VARIANTS = {
    "dense": {},
    "grouped_query": {"heads": 4, "kv_heads": 2},
    "one_key_head": {"heads": 4, "kv_heads": 1, "rope_theta": 100.0},
    "tied": {"tie_embeddings": True},
    "padded": {"vocab": 29, "vocab_multiple": 8},
    "padded_tied": {"vocab": 29, "vocab_multiple": 8, "tie_embeddings": True},
    "layer_norm": {"norm": "layer"},
    "gelu": {"activation": "gelu"},
    "learned": {"positions": "learned", "max_positions": 6},
    "alibi": {"positions": "alibi", "heads": 4, "kv_heads": 2},
    "alibi_of_other_numbers_of_heads": {"positions": "alibi", "hidden": 18, "heads": 6},
    "embedding_norm": {"embedding_norm": True},
    "no_positions": {"positions": "none"},
    "wide_heads": {"head_dim": 12, "heads": 4, "kv_heads": 2},
    "narrow_heads": {"head_dim": 3, "heads": 5, "positions": "none"},
    "query_and_key_norms": {"qk_norm": True, "heads": 4, "kv_heads": 2},
    "norms_after_blocks": {"norm_position": "after"},
    "layer_norms_after_blocks_with_biases": {"norm_position": "after", "norm": "layer", "bias": "all"},
    "moe_and_norms_after_blocks": {"norm_position": "after", "moe": MoEConfig(experts=4, top_k=2, ffn=6, shared_experts=1)},
    "norms_of_all_heads": {"qk_norm": True, "qk_norm_over": "all", "heads": 4, "kv_heads": 2},
    "window": {"window": 2},
    "window_in_some_layers": {"window": 2, "full_attention_every": 2},
    "window_in_some_layers_with_slopes": {"window": 3, "full_attention_every": 3, "positions": "alibi"},
    "scaled_rotations": {"rope_scaling": "llama3", "rope_original_positions": 16, "head_dim": 16},
    "rotations_all_slower": {"rope_scaling": "linear", "rope_factor": 4.0},
    "yarn": {"rope_scaling": "yarn", "rope_original_positions": 40, "rope_beta_fast": 4.0, "rope_theta": 100.0, "head_dim": 16},
    "yarn_in_some_layers": {"rope_scaling": "yarn", "rope_original_positions": 16, "rope_theta": 100.0, "window": 2,
                            "rope_attention_factor": 1.4, "full_attention_every": 2, "rope_scaled_layers": "full"},
    "rotations_slower_in_some_layers": {"rope_scaling": "linear", "window": 3, "full_attention_every": 3,
                                        "rope_scaled_layers": "full"},
    "bias_of_attention": {"bias": "attention", "qk_norm": True},
    "bias_of_all": {"bias": "all"},
    "bias_of_all_but_experts": {"bias": "all", "moe": MoEConfig(experts=4, top_k=2, ffn=6, every=2, shared_experts=1)},
    "moe": {"moe": MOE},
    "moe_gelu_shared": {"activation": "gelu", "moe": MoEConfig(experts=4, top_k=2, ffn=6, every=2, shared_experts=1)},
    "moe_every_2_shared": {"moe": MoEConfig(experts=5, top_k=3, ffn=6, every=2, shared_experts=2)},
    "moe_top_1_tied": {"moe": MoEConfig(experts=3, top_k=1, ffn=6), "tie_embeddings": True},
    "moe_all": {"moe": MoEConfig(experts=3, top_k=3, ffn=6)},
    **STYLES,
}  # fmt: skip
BATCH, LENGTH = 2, 5


def config_of(variant: str) -> ModelConfig:
    return ModelConfig(**{"layers": 3, "hidden": 16, "heads": 2, "ffn": 10, "vocab": 24, **VARIANTS[variant]})


def filled(config: ModelConfig, dtype: torch.dtype, recompute: Sequence[str] = (), offload_bytes: int = 0) -> Decoder:
    """Weights large enough that every nonlinearity is felt; norms off 1."""
    model = Decoder(config, [LayerSlice.of_layers(range(config.layers))], recompute=recompute, offload_bytes=offload_bytes).to(
        dtype
    )
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
        parameter.data.copy_(values + 1 if name.endswith("norm.weight") else values)
    return model


def tokens(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(0, config.vocab, (2, BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
    inputs, labels = drawn[0], drawn[1].clone()
    labels[0, 1] = labels[1, 4] = -100
    return inputs, labels


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_all_gradients_are_those_of_the_reference(variant: str) -> None:
    config = config_of(variant)
    model = filled(config, torch.float64)
    inputs, labels = tokens(config)
    loss, balance = model(inputs, labels)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    mean, expected_balance = reference.losses(config, weights, inputs, labels)

    counted = (labels != -100).sum()
    torch.testing.assert_close(loss / counted, mean, rtol=1e-10, atol=0)
    torch.testing.assert_close(balance, expected_balance, rtol=1e-10, atol=0)
    (loss / counted + 0.3 * balance).backward()
    (mean + 0.3 * expected_balance).backward()
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        assert expected is not None
        unfelt = reference.unfelt(config) and name.endswith("key.bias")
        assert unfelt or expected.abs().max() > 1e-6, f"{name} takes no part: the comparison would show nothing"
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_padding_rows_of_the_vocabulary_get_no_gradient() -> None:
    config = config_of("padded")
    model = filled(config, torch.float64)
    model(*tokens(config))[0].backward()
    assert model.head.weight.shape[0] == 32
    assert not model.head.weight.grad[29:].any()


def test_stages_one_after_the_other_are_the_whole() -> None:
    config = config_of("moe_every_2_shared")
    whole = filled(config, torch.float64)
    stages = [
        Decoder(config, [LayerSlice.of_layers(range(1))], True, False),
        Decoder(config, [LayerSlice.of_layers(range(1, 3))], False, True),
    ]
    inputs, labels = tokens(config)
    x, total = inputs, torch.zeros((), dtype=torch.float64)
    names = set()
    for stage, its_labels in zip(stages, (None, labels), strict=True):
        own = {name: value for name, value in whole.state_dict().items() if name in stage.state_dict()}
        names |= own.keys()
        stage.double().load_state_dict(own)
        x, balance = stage(x, its_labels)
        total = total + balance
    assert names == whole.state_dict().keys()
    torch.testing.assert_close((x, total), whole(inputs, labels), rtol=1e-12, atol=0)


@pytest.mark.parametrize("cut", range(1, 6))
@pytest.mark.parametrize("variant", ["moe_every_2_shared", "olmo3"])
@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_two_slices_are_the_whole_wherever_they_meet(variant: str, cut: int, recompute: str) -> None:
    """On two ranks, each with its own halves, and on one rank, which holds the layer between them whole; in a row of two
    documents. All parameters get the gradients that they get in the whole model, under the same names."""
    config = config_of(variant)
    again = [recompute] * config.layers
    whole = filled(config, torch.float64, again)
    slices = [LayerSlice(0, cut), LayerSlice(cut, 6)]
    inputs, labels = tokens(config)
    documents = torch.tensor([[0, 0, 2, 2, 2], [0, 0, 0, 3, 3]])
    expected, balance = whole(inputs, labels, 0, documents)
    (expected + 0.3 * balance).backward()
    apart = [Decoder(config, slices[:1], True, False, again), Decoder(config, slices[1:], False, True, again)]
    for stages in (apart, [Decoder(config, slices, recompute=again)] * 2):
        for stage in stages:
            stage.double().load_state_dict({name: whole.state_dict()[name] for name in stage.state_dict()})
        x, first = stages[0](inputs, None, 0, documents)
        x, second = stages[1](x, labels, 1 if stages[0] is stages[1] else 0, documents)
        torch.testing.assert_close((x, first + second), (expected, balance), rtol=1e-12, atol=0)
        (x + 0.3 * (first + second)).backward()
        found = {name: parameter.grad for stage in stages for name, parameter in stage.named_parameters()}
        assert found.keys() == dict(whole.named_parameters()).keys()
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def counted(modules: dict[str, nn.Module]) -> dict[str, int]:
    """How often each of the modules is called from now on."""
    calls = dict.fromkeys(modules, 0)

    def count(name: str) -> Callable[..., None]:
        def add(*_: object) -> None:
            calls[name] += 1

        return add

    for name, module in modules.items():
        module.register_forward_pre_hook(count(name))
    return calls


@pytest.mark.parametrize("variant", ["dense", "moe_every_2_shared", "gpt", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("recompute", "attention", "experts"),
    [(("full",) * 3, 2, 2), (("attention",) * 3, 2, 1), (("none", "experts", "full"), 1, 2), (("full", "none", "attention"), 1, 1)],
)
@pytest.mark.parametrize("offload_bytes", [0, 5000, 2**30])
def test_recomputing_and_host_memory_change_no_bit(
    variant: str, dtype: torch.dtype, recompute: tuple[str, ...], attention: int, experts: int, offload_bytes: int
) -> None:
    """Only those parts of layer 1 run twice that must, and no token is counted twice."""
    config = config_of(variant)
    config.moe = replace(config.moe, bias_rate=0.1 if config.moe.experts else None)
    results, loads = [], []
    for parts, offload in (((), 0), (recompute, offload_bytes)):
        model = filled(config, dtype, parts, offload)
        layer = model.layers["1"]
        calls = counted({"layer": layer, "attention": layer.attention, "experts": layer.feed_forward})
        loss, balance = model(*tokens(config))
        assert (model.host_memory.bytes > 0) == (offload > 0)
        assert model.host_memory.bytes <= offload
        (loss + balance).backward()
        assert model.host_memory.bytes == 0
        assert calls == {"layer": 1 + (bool(parts) and recompute[1] == "full"), "attention": attention if parts else 1,
                         "experts": experts if parts else 1}  # fmt: skip
        results.append([loss.detach(), balance.detach(), *(p.grad for p in model.parameters())])
        loads.append(model._loads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert loads[0].keys() == loads[1].keys() == {i for i in range(3) if config.is_moe_layer(i)}
    for index, load in loads[0].items():
        assert torch.equal(load, loads[1][index])
        assert load.sum() == BATCH * LENGTH * config.moe.top_k


def test_the_first_layer_is_recomputed_too_where_the_embedding_is_frozen() -> None:
    """Its input needs no gradient then."""
    config = config_of("dense")
    model = filled(config, torch.float64, ["full"] * 3)
    assert model.embedding is not None
    model.embedding.weight.requires_grad_(False)
    calls = counted({"layer": model.layers["0"]})
    loss, _ = model(*tokens(config))
    loss.backward()
    assert calls == {"layer": 2}


@pytest.mark.parametrize("variant", ["grouped_query", "moe_every_2_shared", *STYLES])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_16_bit_losses_are_float32_and_near(variant: str, dtype: torch.dtype, relative: float) -> None:
    config = config_of(variant)
    model = filled(config, dtype)
    exact = filled(config, torch.float64)
    exact.load_state_dict(model.state_dict())
    loss, balance = model(*tokens(config))
    assert loss.dtype == balance.dtype == torch.float32
    expected, _ = exact(*tokens(config))
    torch.testing.assert_close(loss.double(), expected, rtol=relative, atol=0)


@pytest.mark.parametrize("variant", ["dense", "padded_tied"])
def test_without_labels_it_gives_the_logits_behind_the_loss(variant: str) -> None:
    config = config_of(variant)
    model = filled(config, torch.float64)
    inputs, labels = tokens(config)
    loss, _ = model(inputs, labels)
    logits, _ = model(inputs)
    assert logits.shape == (BATCH, LENGTH, config.vocab)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def in_pieces(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention, row by row."""
    key, value = (heads.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for heads in (key, value))
    rows = []
    for row in range(query.shape[2]):
        scores = query[:, :, row : row + 1] @ key[:, :, : row + 1].mT / query.shape[-1] ** 0.5
        rows.append(scores.softmax(-1) @ value[:, :, : row + 1])
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_attention_and_positions_can_be_replaced(recompute: str) -> None:
    """A plain attention changes nothing. Angles of a later segment change nothing either: only differences of angles matter."""
    config = config_of("grouped_query")
    inputs, labels = tokens(config)
    results = []
    for replaced in (False, True):
        model = filled(config, torch.float64, [recompute] * 3)
        for layer in model.layers.values() if replaced else ():
            later = layer.attention.positions
            layer.attention.attend = in_pieces
            layer.attention.positions = lambda length, *kind, all=later: tuple(angles[7:] for angles in all(length + 7, *kind))
        loss, _ = model(inputs, labels)
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-12)


def test_a_default_that_is_given_makes_no_other_model() -> None:
    yarn = ModelConfig(rope_scaling="yarn", rope_factor=4.0)
    assert replace(yarn, rope_attention_factor=yarn.rope_amplitude).identity() == yarn.identity()
    assert replace(yarn, rope_attention_factor=1.0).identity() != yarn.identity()
    assert replace(yarn, head_dim=64).identity() == yarn.identity()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_logits_are_those_of_the_loss(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    head = Head(24, 16, 20).to(dtype)
    torch.nn.init.normal_(head.weight, generator=draw)
    x, labels = torch.randn(2, 5, 16, generator=draw).to(dtype), torch.randint(20, (2, 5), generator=draw)
    logits = head(x)
    assert (logits.shape, logits.dtype) == ((2, 5, 20), torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(head(x, labels).to(expected.dtype), expected, rtol=1e-6, atol=0)
