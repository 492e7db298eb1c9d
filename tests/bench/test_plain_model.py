"""The plain model, the baseline of the benchmarks, is right: a slow baseline flatters, a wrong one does worse."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are programs, not an installed package

from contest.entry import parse
from contest.loop import build_model, plain
from contest.model import Attention, Mixture, rotary_tables
from contest.report import add_ratios, result
from contest.shapes import SHAPES, Shape
from contest.team import Sample

DENSE = Shape(layers=2, hidden=32, heads=4, ffn=48, vocab=64, sequence=16, batch=4)
MOE = Shape(layers=2, hidden=32, heads=4, ffn=24, vocab=64, sequence=16, batch=4, experts=4)


@pytest.mark.parametrize("shape", [DENSE, MOE])
@pytest.mark.parametrize("precision", ["bf16", "bf16wide", "autocast", "f32"])
def test_the_loop_learns_a_batch_by_heart(shape: Shape, precision: str) -> None:
    step = plain(shape, precision, compiled=False)
    tokens = torch.randint(shape.vocab, (shape.batch, shape.sequence + 1), generator=torch.Generator().manual_seed(1))
    losses = [step(tokens[:, :-1], tokens[:, 1:]) for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("shape", [DENSE, MOE])
@pytest.mark.parametrize("precision", ["bf16wide", "f32"])
def test_parameter_count(shape: Shape, precision: str) -> None:
    assert sum(p.numel() for p in build_model(shape, precision).parameters()) == shape.parameters


def test_attention_sees_the_past_only_and_rotates_by_distance() -> None:
    attention = Attention(DENSE, wide=False).double()
    cos, sin = (table.double() for table in rotary_tables(DENSE))
    x = torch.randn(1, DENSE.sequence, DENSE.hidden, dtype=torch.float64)
    changed = x.clone()
    changed[:, 9:] += 1
    before, after = attention(x, cos, sin), attention(changed, cos, sin)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])

    q, k = torch.randn(2, 1, DENSE.head_dim)
    cos, sin = rotary_tables(DENSE)  # float32, and so is what follows from them
    rotated_q, rotated_k = (y * cos + y.roll(DENSE.head_dim // 2, -1) * sin for y in (q, k))
    scores = rotated_q @ rotated_k.t()  # [query position, key position]
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    assert not torch.allclose(scores[0], scores[0, 0])


def test_mixture_equals_a_loop_over_tokens() -> None:
    mixture = Mixture(MOE, wide=False)
    x = torch.randn(2, MOE.sequence, MOE.hidden)
    output, balance = mixture(x)
    probability = F.linear(x, mixture.router).softmax(-1)
    expected = torch.zeros_like(x)
    for b in range(2):
        for s in range(MOE.sequence):
            weight, chosen = probability[b, s].topk(MOE.top_k)
            for w, e in zip(weight / weight.sum(), chosen.tolist(), strict=True):
                expected[b, s] += w * mixture.experts[e](x[b, s])
    torch.testing.assert_close(output, expected)
    assert balance.item() >= 0.9  # 1 when tokens and probabilities are spread evenly


def test_rows_that_are_padded_change_no_result() -> None:
    x, results = torch.randn(2, MOE.sequence, MOE.hidden), []
    for rows in (1, 64):
        torch.manual_seed(3)
        results.append(Mixture(MOE, wide=False, rows=rows)(x))
    for usual, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, usual)


def test_wide_arithmetic_differs_from_float32_by_rounding_only() -> None:
    tokens = torch.randint(DENSE.vocab, (DENSE.batch, DENSE.sequence + 1))
    exact, wide = build_model(DENSE, "f32"), build_model(DENSE, "bf16wide")
    for model in (exact, wide):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    for a, b in zip(exact.parameters(), wide.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad.float()).norm() < 0.03 * a.grad.norm()


def test_contestant_names_round_trip_and_say_what_is_wrong() -> None:
    names = "plain-f32-compiled@1x2 ddp-bf16@2x1 fsdp-bf16-compiled@2x1 plainpad-bf16@1x2 bagualu@1x2 bagualu-tensor@2x1"
    for text in (*names.split(), "bagualu-compiled@1x2"):
        assert parse(text, 2).name == text
    assert parse("ddp", 4).name == "ddp-bf16@2x2"
    wrong = {"ddp-f64": "autocast", "horovod": "deepspeed", "plain@2x1": "ddp", "plain@0x1": "PROGRAM"}
    wrong["torchtp-compiled"] = "plainpad, ddp"
    for text, fix in wrong.items():
        with pytest.raises(ValueError, match=fix):
            parse(text, 2)


def test_all_are_compared_with_the_best_plain_loop() -> None:
    shape = SHAPES["bench_dense"]
    seconds = {"plain-bf16": 4.0, "plain-f32": 2.0, "plain-f32-compiled": 1.0, "bagualu": 1.6, "bagualu-compiled": 1.0}
    rows = [result(parse(name, 2), shape, [Sample([took], [], 10)], 1e12) for name, took in seconds.items()]
    add_ratios(rows, None)
    assert [row["ratio"] for row in rows] == pytest.approx([0.25, 0.5, 1.0, 0.625, 1.0])
