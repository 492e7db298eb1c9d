"""Attention in blocks is torch's attention, whatever the blocks, and is taken where it is quicker. See test_conformance.py as
well."""

import pytest
import torch
import torch.nn.functional as F

from bagualu.parallel import precision
from bagualu.parallel.precision import accurate_dtype
from bagualu.trainer.operators import attention
from bagualu.trainer.operators.alibi import Slopes
from bagualu.trainer.operators.attention import attention_in_blocks, attention_to_seen, causal_attention, mask_of_seen
from tests.trainer.models.reference import slope


def draw(batch: int, length: int, heads: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[B, A, S, D] as a layer hands it over: heads of a projection."""
    drawn = torch.randn(batch, length, heads, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype).transpose(1, 2).requires_grad_()


SLOPES = torch.tensor([0.7, 0.2, 0.003], dtype=torch.float64)


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """torch's attention with a mask that is written out."""
    positions = torch.arange(query.shape[2], dtype=query.dtype)
    distances = positions - positions.unsqueeze(1)
    mask = torch.zeros_like(distances) if slopes is None else slopes.to(query.dtype).view(-1, 1, 1) * distances
    hidden = (distances > 0) | (-distances >= (window or query.shape[2]))
    return F.scaled_dot_product_attention(query, key, value, mask.masked_fill(hidden, -torch.inf))


@pytest.mark.parametrize(("rows", "elements"), [(64, 2**20), (1, 1), (3, 50), (7, 260), (100, 10)])
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["", "slopes"])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 20])
def test_it_does_not_depend_on_the_blocks(
    rows: int, elements: int, slopes: torch.Tensor | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block, blocks that leave a rest of rows and of heads, blocks of one row: all are torch's attention."""
    monkeypatch.setattr(attention, "_BLOCK_ROWS", rows)
    monkeypatch.setattr(attention, "_BLOCK_ELEMENTS", elements)
    inputs = [draw(2, 9, 3, 4, seed) for seed in range(3)]
    results = attention_in_blocks(*inputs, slopes, window), masked_attention(*inputs, slopes, window)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)
    seed = draw(2, 9, 3, 4, 3).detach()
    for own, reference in zip(*(torch.autograd.grad(result, inputs, seed) for result in results), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-12, atol=1e-13)


def test_16_bit_errors_are_like_those_of_torchs_kernel() -> None:
    """Relative to the exact values, over several blocks and with a scale that is no power of 2: at most half more."""
    exact = [draw(2, 150, 2, 80, seed, torch.bfloat16).detach().double().requires_grad_() for seed in range(4)]

    def errors(kernel: object) -> list[float]:
        narrow = [x.detach().bfloat16().requires_grad_() for x in exact[:3]]
        result = kernel(*narrow)
        found = [result, *torch.autograd.grad(result, narrow, exact[3].detach().bfloat16())]
        return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True)]

    def torchs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    result = torchs(*exact[:3])
    expected = [result, *torch.autograd.grad(result, exact[:3], exact[3].detach())]
    for own, reference in zip(errors(attention_in_blocks), errors(torchs), strict=True):
        assert own < 1.5 * reference


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("length", "dtype", "native", "blocks"),
    [
        (512, torch.bfloat16, True, True),
        (513, torch.bfloat16, True, False),
        (512, torch.bfloat16, False, False),
        (512, torch.float32, True, False),
        (512, torch.float16, True, False),  # whose range the products of gradients would leave
    ],
)
def test_it_is_taken_for_short_sequences_of_bfloat16_that_the_processor_multiplies(
    length: int, dtype: torch.dtype, native: bool, blocks: bool, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_CPU_MULTIPLIES", {torch.bfloat16: native, torch.float16: native})
    calls = []
    monkeypatch.setattr(attention, "attention_in_blocks", lambda *inputs: calls.append(inputs) or attention_in_blocks(*inputs))
    query, key, value = (draw(1, length, shared, 8, seed, dtype).detach() for seed, shared in enumerate((2, heads, heads)))
    found = causal_attention(query, key, value)
    assert bool(calls) == blocks
    assert found.dtype == dtype
    wide = (t.double().repeat_interleave(2 // t.shape[1], dim=1) for t in (query, key, value))
    torch.testing.assert_close(found.double(), F.scaled_dot_product_attention(*wide, is_causal=True), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("dtype", "length", "error"),
    [(torch.float64, 70, 1e-12), (torch.float32, 600, 1e-4), (torch.bfloat16, 70, 1e-2), (torch.bfloat16, 2100, 1e-2),
     (torch.float16, 600, 2e-3)],
    ids=str,
)  # fmt: skip
def test_slopes_and_positions_are_not_rounded(dtype: torch.dtype, length: int, error: float) -> None:
    """Relative to exact values in the Euclidean norm; slopes of no power of 2, and heads that share keys."""
    narrow = [draw(1, length, heads, 8, seed, dtype).detach().requires_grad_() for seed, heads in enumerate((6, 3, 3, 6))]
    slopes = torch.tensor([0.7, 0.3, 0.1, 0.03, 0.007, 0.0007], dtype=torch.float64)
    exact = [x.detach().double().requires_grad_() for x in narrow]
    shared = (x.repeat_interleave(2, 1) for x in exact[1:3])
    result, expected = causal_attention(*narrow[:3], slopes.to(accurate_dtype(dtype))), masked_attention(exact[0], *shared, slopes)
    assert result.dtype == dtype
    found = [result, *torch.autograd.grad(result, narrow[:3], narrow[3])]
    for own, reference in zip(found, [expected, *torch.autograd.grad(expected, exact[:3], exact[3])], strict=True):
        assert (own.double() - reference).norm() <= error * reference.norm()


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 112])
def test_every_rank_has_the_slopes_of_its_heads(heads: int) -> None:
    given = (torch.float64, torch.device("cpu"))
    whole = Slopes(heads)(heads, *given)
    assert whole.tolist() == pytest.approx([slope(heads, head) for head in range(heads)], rel=1e-12)
    second = Slopes(heads)
    second.first = heads // 2
    assert torch.equal(second(heads - heads // 2, *given), whole[heads // 2 :])


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("slopes", [None, torch.tensor([0.7, 0.2, 0.3, 0.003])], ids=["", "slopes"])
@pytest.mark.parametrize("queries", [1, 8, 9])
def test_queries_see_what_they_are_to_see(dtype: torch.dtype, error: float, slopes: torch.Tensor | None, queries: int) -> None:
    """Two heads share a key, so 8 queries are the most that are multiplied without torch's kernel."""
    query, key, value = (draw(2, length, heads, 8, seed, dtype).detach() for seed, (length, heads) in
                         enumerate(((queries, 4), (70, 2), (70, 2))))  # fmt: skip
    own = torch.arange(60 - queries, 60)
    columns = torch.arange(70)
    distances = columns - own.unsqueeze(1)
    seen = ((distances <= 0) & (columns >= torch.tensor([0, 5]).view(-1, 1, 1))).unsqueeze(1)
    slopes = None if slopes is None else slopes.to(accurate_dtype(dtype))
    found = attention_to_seen(query, key, value, mask_of_seen(seen, distances, 2, dtype, slopes))
    exact, keys, values = query.double(), *(x.double().repeat_interleave(2, 1) for x in (key, value))
    scores = exact @ keys.mT / 8**0.5 + (0 if slopes is None else slopes.double().view(-1, 1, 1) * distances)
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    assert (found.shape, found.dtype) == (query.shape, dtype)
    assert (found.double() - expected).norm() <= error * expected.norm()
