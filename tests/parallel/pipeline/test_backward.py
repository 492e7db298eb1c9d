"""The backward pass from given gradients against torch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bagualu.parallel.pipeline.backward import backward


def gradients(go_back: Callable[..., Any], dtype: torch.dtype) -> list[torch.Tensor]:
    """Of two leaves that two outputs share, one of them a scalar, after two passes."""
    draw = torch.Generator().manual_seed(1)
    one = torch.randn(3, 4, generator=draw).to(dtype).requires_grad_()
    other = torch.randn(4, 5, generator=draw).to(dtype).requires_grad_()
    for _ in range(2):
        product = (one @ other).sin()
        given = torch.randn(3, 5, generator=draw).to(dtype)
        go_back([product, product.square().mean()], [given, torch.tensor(0.3, dtype=dtype)])
    assert one.grad is not None
    assert other.grad is not None
    return [one.grad, other.grad]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_torch_to_the_bit(dtype: torch.dtype) -> None:
    for ours, theirs in zip(gradients(backward, dtype), gradients(torch.autograd.backward, dtype), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(2, 3), (1,), (3, 1), ()])
def test_a_gradient_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    leaf = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"an output of shape \[3\] has no gradient of shape"):
        backward([leaf * 2], [torch.ones(shape)])
    assert leaf.grad is None


def test_the_graph_is_gone_afterwards_and_the_gradient_stays_as_it_was() -> None:
    leaf, given = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)
    output = leaf.exp()
    backward([output], [given])
    assert given.tolist() == [2.0] * 3
    with pytest.raises(RuntimeError, match="second time"):
        backward([output], [given])
