import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bagualu.trainer.costs.throughput import matmul_ceiling
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.models.decoder.flops import model_flops_per_token
from tests.trainer.models.styles import STYLES

SHAPE = {"layers": 3, "hidden": 24, "heads": 6, "kv_heads": 2, "ffn": 40, "vocab": 50, "vocab_multiple": 32}
S = 7


def weight(*shape: int) -> Tensor:
    return torch.zeros(shape, requires_grad=True)


def feed_forward(x: Tensor, width: int, gated: bool) -> Tensor:
    hidden = x.shape[1]
    inner = x @ weight(hidden, width)
    return (inner * (x @ weight(hidden, width)) if gated else inner) @ weight(width, hidden)


def attention(x: Tensor, config: ModelConfig, layer: int) -> Tensor:
    """Every query against the keys it may see and no others, x: [S, hidden]."""
    everywhere = config.full_attention_every and (layer + 1) % config.full_attention_every == 0
    seen = [slice(0 if everywhere or not config.window else max(0, i + 1 - config.window), i + 1) for i in range(S)]
    width, narrow = config.heads * config.head_width, config.key_value_heads * config.head_width
    q = (x @ weight(config.hidden, width)).view(S, config.heads, config.head_width).transpose(0, 1)
    k, v = ((x @ weight(config.hidden, narrow)).view(S, -1, config.head_width).transpose(0, 1) for _ in range(2))
    k, v = (t.repeat_interleave(config.heads // config.key_value_heads, 0) for t in (k, v))
    rows = [torch.bmm(torch.bmm(q[:, i : i + 1], k[:, seen[i]].transpose(1, 2)), v[:, seen[i]]) for i in range(S)]
    return torch.cat(rows, 1).transpose(0, 1).reshape(S, width) @ weight(width, config.hidden)


def counted_flops(config: ModelConfig) -> int:
    """FLOPs of forward and backward of a model that has the right products and nothing else."""
    x = torch.zeros(S, config.hidden, requires_grad=True)
    moe, gated = config.moe, config.activation == "swiglu"
    with FlopCounterMode(display=False) as counter:
        for layer in range(config.layers):
            x = attention(x, config, layer)
            if config.is_moe_layer(layer):
                routed = sum(feed_forward(x, moe.ffn, gated) for _ in range(moe.top_k + moe.shared_experts))
                x = routed + (x @ weight(config.hidden, moe.experts)).sum(1, keepdim=True)
            else:
                x = feed_forward(x, config.ffn, gated)
        (x @ weight(config.hidden, config.vocab)).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(),
        MoEConfig(experts=8, top_k=2, ffn=16),
        MoEConfig(experts=8, top_k=3, ffn=16, shared_experts=2, every=2),
    ],
    ids=["dense", "moe", "moe every other layer"],
)
@pytest.mark.parametrize("options", [{"kv_heads": None}, *STYLES.values()], ids=str)
def test_flops_are_those_of_the_products(moe, options):
    config = ModelConfig(**(SHAPE | options), moe=moe)
    config.validate()
    assert model_flops_per_token(config, S) * S == pytest.approx(counted_flops(config), rel=1e-14)


def test_a_large_model_costs_six_flops_a_weight():
    config = ModelConfig(layers=32, hidden=4096, heads=32, ffn=11008, vocab=32000)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    assert model_flops_per_token(config, 1) == pytest.approx(6 * weights, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_ceiling_is_a_rate_and_leaves_the_threads_alone(dtype):
    before = torch.get_num_threads()
    assert 1e6 < matmul_ceiling(dtype, torch.device("cpu"), threads=1, budget_seconds=0.02) < 1e15
    assert torch.get_num_threads() == before
