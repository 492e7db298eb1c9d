"""Packed weights give the products of the weights as they are."""

import pytest
import torch
import torch.nn.functional as F

from bagualu.parallel.precision import multiply_dtype
from bagualu.trainer.operators.linear import linears
from bagualu.trainer.operators.packed import can_pack, pack


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_products_are_those_of_the_weight_as_it_is(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(rows)
    weight, bias, x = torch.randn(50, 37).to(dtype), torch.randn(50).to(dtype), torch.randn(rows, 1, 37).to(dtype)
    if not can_pack(weight):
        assert dtype == torch.bfloat16 != multiply_dtype(weight), "only a processor without bfloat16 packs none of it"
        pytest.skip("this processor does not multiply bfloat16")
    packed = pack(weight)
    with torch.no_grad():
        for biases in ((bias,), ()):
            wanted = F.linear(x.double(), weight.double(), bias.double() if biases else None)
            (found,) = linears(x, packed, biases=biases)
            assert (found.shape, found.dtype) == ((rows, 1, 50), dtype)
            assert float((found.double() - wanted).norm() / wanted.norm()) < tolerance
        assert torch.equal(linears(x, packed, factor=x)[0], linears(x * x, packed)[0])


def test_float64_and_parts_of_weights() -> None:
    assert not can_pack(torch.randn(4, 4, dtype=torch.float64))
    assert not can_pack(torch.randn(4, 4, device="meta"))
    weight, x = torch.randn(50, 37), torch.randn(2, 30)
    with torch.no_grad():
        assert torch.allclose(linears(x, pack(weight[:20, 7:]))[0], F.linear(x, weight[:20, 7:]), atol=1e-5)
