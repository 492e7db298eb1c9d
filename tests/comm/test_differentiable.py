"""Each differentiable collective's backward is its transpose: <A x, y> summed over ranks equals <x, A^T y>."""

from functools import partial

import pytest
import torch

from bagualu.comm import differentiable as d
from bagualu.comm.group import Communicator
from tests.harness import BACKENDS, run

SENDS = [[1, 2], [0, 3]]


def exchange(x: torch.Tensor, c: Communicator) -> torch.Tensor:
    return d.all_to_all(x, c.world, [row[c.rank] for row in SENDS], SENDS[c.rank])


# name: (function, whether x or the output is the same tensor on every rank)
OPERATORS = {
    "copy_to": (lambda x, c: d.copy_to(x, c.world), True, False),
    "reduce_from": (lambda x, c: d.reduce_from(x, c.world), False, True),
    "gather_from": (lambda x, c: d.gather_from(x, c.world, 1), False, False),
    "scatter_to": (lambda x, c: d.scatter_to(x, c.world, 1), False, False),
    "all_to_all": (exchange, False, False),
}


def transpose(c: Communicator, name: str) -> None:
    operator, same_input, same_output = OPERATORS[name]
    seeded = partial(torch.Generator().manual_seed, 0 if same_input else c.rank)
    x = torch.randn(3, 4, 2, dtype=torch.float64, generator=seeded()).requires_grad_()
    output = operator(x, c)
    y = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7 if same_output else 50 + c.rank))
    output.backward(y)
    left, right = (output.detach() * y).sum(), (x.detach() * x.grad).sum()
    if not same_output:
        c.world.all_reduce(left)
    if not same_input:
        c.world.all_reduce(right)
    # Where the input is the same on every rank, its gradient already holds the sum over ranks.
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_is_the_transpose(backend: str, name: str) -> None:
    run(backend, 2, transpose, name)
