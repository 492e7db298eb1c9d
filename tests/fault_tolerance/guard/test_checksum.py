"""Every flipped bit changes a checksum, and equal bits have equal checksums wherever they lie."""

import pytest
import torch

from bagualu.fault_tolerance.guard.checksum import checksum, combine

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 7, 8, 511, 512, 513, 5000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_any_single_bit_counts(dtype: torch.dtype, size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    before, octets = int(checksum(values)), values.view(torch.uint8)
    for place in {0, octets.numel() // 2, octets.numel() - 1}:
        for bit in range(8):
            octets[place] ^= 1 << bit
            assert int(checksum(values)) != before
            octets[place] ^= 1 << bit
    assert int(checksum(values)) == before


def test_a_zero_that_becomes_minus_zero_counts() -> None:
    assert int(checksum(torch.zeros(64))) != int(checksum(torch.zeros(64).index_fill_(0, torch.tensor([5]), -0.0)))


def test_rows_that_change_places_count() -> None:
    values = torch.randn(4096)
    assert int(checksum(values)) != int(checksum(values.roll(1024)))
    assert int(combine(torch.tensor([1, 2, 3]))) != int(combine(torch.tensor([2, 1, 3])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_the_bits_lie_does_not_matter(dtype: torch.dtype) -> None:
    values = torch.randn(1003).to(dtype)
    for begin in (1, 2, 3, 8):
        inside = torch.zeros(2000, dtype=dtype)
        inside[begin : begin + 1003] = values
        assert int(checksum(inside[begin : begin + 1003])) == int(checksum(values))


def test_nothing_has_a_checksum_too() -> None:
    assert int(checksum(torch.empty(0))) == 0
