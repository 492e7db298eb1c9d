"""Initial weights depend on seed, name and place in the global tensor, and on nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bagualu.parallel.boxes import Box
from bagualu.trainer.models.decoder import initialise
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.initialise import initial_values, normal_values
from bagualu.trainer.models.decoder.plan import decoder_plan

PLAN = decoder_plan(ModelConfig(), sequence=False)


def whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    offset = tuple(draw(st.integers(0, n)) for n in shape)
    return shape, Box(offset, tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True)))


@settings(deadline=None)
@given(boxes(), st.integers(0, 3), st.sampled_from([1, 3, 5, 1024]))
def test_any_box_is_a_slice_of_the_whole(drawn: tuple[tuple[int, ...], Box], seed: int, block: int) -> None:
    shape, box = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialise, "BLOCK", block)
        everything = normal_values(seed, "w", shape, whole(shape), 0.02)
        assert torch.equal(normal_values(seed, "w", shape, box, 0.02), everything[box.slices((0,) * len(shape))])


def test_seeds_names_and_blocks_differ() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialise, "BLOCK", 16)
        values = [normal_values(seed, name, (2, 32, 32), whole((2, 32, 32)), 1.0) for seed in (0, 1) for name in ("a", "b")]
    blocks = [block for value in values for rows in value for row in rows.split(16) for block in row.split(16, dim=1)]
    assert len(blocks) == 4 * 8
    for i, one in enumerate(blocks):
        for other in blocks[:i]:
            correlation = (one * other).mean()  # of 256 pairs: deviation 1/16
            assert abs(correlation) < 0.4


def test_mean_and_deviation() -> None:
    values = normal_values(7, "w", (300, 1500), whole((300, 1500)), 0.02)
    assert values.dtype == torch.float32
    assert abs(values.mean()) < 0.02 * 5 / 450_000**0.5
    assert abs(values.std() / 0.02 - 1) < 5 / (2 * 450_000) ** 0.5
    assert 0.08 < values.abs().max() < 0.13  # neither clipped nor with outliers


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = normal_values(0, "w", (8,), whole((8,)), 1.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, normal_values(0, "w", (8,), whole((8,)), 1.0))


def test_values_stay_what_they_are() -> None:
    """A run resumed or compared years later starts from the same numbers."""
    values = normal_values(0, "layers.0.attention.query.weight", (2, 2), whole((2, 2)), 1.0)
    expected = torch.tensor([[-0.8624523, 1.1493275], [-1.2536949, 1.1510299]])
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("embedding.weight", 0.05),
        ("head.weight", 0.05),
        ("layers.1.attention.query.weight", 0.05),
        ("layers.1.attention.output.weight", 0.05 / 8**0.5),
        ("layers.1.feed_forward.gate.weight", 0.05),
        ("layers.1.feed_forward.down.weight", 0.05 / 8**0.5),
        ("layers.1.feed_forward.shared.down.weight", 0.05 / 8**0.5),
        ("layers.1.feed_forward.router.weight", 0.05),
        ("layers.1.feed_forward.experts.up", 0.05),
        ("layers.1.feed_forward.experts.down", 0.05 / 8**0.5),
    ],
)
def test_what_writes_into_the_residual_stream_is_smaller(name: str, deviation: float) -> None:
    values = initial_values(PLAN, 0, 0.05, 4, name, (100, 200), whole((100, 200)))
    assert abs(values.std() / deviation - 1) < 0.03


@pytest.mark.parametrize("name", ["norm.weight", "layers.3.attention_norm.weight", "layers.3.feed_forward_norm.weight"])
def test_norms_are_ones(name: str) -> None:
    assert torch.equal(initial_values(PLAN, 0, 0.05, 4, name, (6,), Box((2,), (3,))), torch.ones(3))
